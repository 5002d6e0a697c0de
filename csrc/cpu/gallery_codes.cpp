#include "gallery_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "float_mode.h"

namespace simplexfix::cpu {
namespace {
constexpr size_t kChunkBytes = size_t(1) << 18;
// range of a gallery's codes; they are stored plus 128, because the products need them unsigned
constexpr int kRange = 127;

// The first pass rounds its upper bound. The bound is a float sum of dot * scale_r * scale_q, offset and error *
// norm_q. It takes at most eight operations, so its error is below 2^-21 of the sum of their magnitudes. |coded y| <= 2
// |y|, because a code is not 0 only where the number is at least half a step. So 2^-19 |coded x| |y| more in the error,
// and the 2^-20 that round_up adds to each term, cover this rounding.
constexpr double kDotSlack = 0x1p-19;
}  // namespace

float round_up(double x) {
  if (x == 0) return 0.f;
  return std::nextafter(float(x + 0x1p-20 * std::abs(x)), std::numeric_limits<float>::infinity());
}

GalleryCodes::GalleryCodes(int64_t d, std::vector<float> center)
    : d_(d),
      groups_((d + 3) / 4),
      panel_bytes_(size_t(kPanelRows) * (size_t(groups_) * 4 + 3 * sizeof(float))),
      chunk_panels_(std::max<int64_t>(1, int64_t(kChunkBytes / panel_bytes_))),
      center_(std::move(center)) {}

size_t GalleryCodes::bytes() const {
  return chunks_.size() * size_t(chunk_panels_) * panel_bytes_ +
         (panel_norm_.capacity() + center_.capacity()) * sizeof(float);
}

std::byte* GalleryCodes::panel_data(int64_t index) const {
  return chunks_[size_t(index / chunk_panels_)].get() + size_t(index % chunk_panels_) * panel_bytes_;
}

CodePanel GalleryCodes::panel(int64_t index) const {
  const std::byte* data = panel_data(index);
  const auto* numbers = reinterpret_cast<const float*>(data + kPanelRows * groups_ * 4);
  return {reinterpret_cast<const uint8_t*>(data), numbers, numbers + kPanelRows, numbers + 2 * kPanelRows};
}

void GalleryCodes::resize(int64_t n) {
  const int64_t panels = ceil_div(n, kPanelRows), before = ceil_div(size_, kPanelRows);
  const auto chunks = size_t(ceil_div(panels, chunk_panels_)), chunks_before = chunks_.size();
  try {
    chunks_.reserve(chunks);
    while (chunks_.size() < chunks) chunks_.push_back(aligned_array<std::byte>(size_t(chunk_panels_) * panel_bytes_));
    panel_norm_.resize(size_t(panels), 0.f);
  } catch (...) {
    chunks_.resize(chunks_before);
    throw;
  }
  chunks_.resize(chunks);
  for (int64_t p = before; p < panels; ++p) {  // codes of 0, bounds of 0: rows past the end are masked out
    std::memset(panel_data(p), 128, size_t(kPanelRows * groups_ * 4));
    std::memset(panel_data(p) + kPanelRows * groups_ * 4, 0, 3 * kPanelRows * sizeof(float));
  }
  size_ = n;
}

void GalleryCodes::encode(const GalleryRows& rows, int64_t begin, int64_t end) {
  const IeeeArithmetic ieee;
  std::vector<int8_t> codes(size_t(groups_) * 4, 0);
  std::vector<float> scratch(rows.type == RowType::kFloat ? 0 : size_t(d_));
  for (int64_t i = begin; i < end; ++i) {
    const int64_t panel = i / kPanelRows, at = i % kPanelRows;
    const CodeSummary row =
        search_kernels().encode(rows.read(i, scratch.data()), center_.data(), d_, kRange, codes.data());
    std::byte* data = panel_data(panel);
    for (int64_t t = 0; t < groups_; ++t) {
      uint32_t four;
      std::memcpy(&four, codes.data() + t * 4, 4);
      four ^= 0x80808080u;  // plus 128 in each byte
      std::memcpy(data + (t * kPanelRows + at) * 4, &four, 4);
    }
    auto* numbers = reinterpret_cast<float*>(data + kPanelRows * groups_ * 4);
    numbers[at] = row.scale;
    numbers[kPanelRows + at] = round_up(row.center_dot);
    numbers[2 * kPanelRows + at] = round_up(row.residual + kDotSlack * row.code_norm);
    float& norm = panel_norm_[size_t(panel)];
    norm = std::max(at == 0 ? 0.f : norm, round_up(row.code_norm));
  }
}

std::vector<float> central_row(const GalleryRows& rows) {
  const IeeeArithmetic ieee;
  const auto d = size_t(rows.d);
  std::vector<double> mean(d, 0.0);
  std::vector<float> scratch(d);
  const int64_t sample = std::min<int64_t>(rows.n, 1024);
  for (int64_t s = 0; s < sample; ++s) {
    const float* row = rows.read(rows.n * s / sample, scratch.data());
    for (size_t j = 0; j < d; ++j) mean[j] += row[j] / double(sample);
  }
  double square = 0;
  for (double m : mean) square += m * m;
  constexpr double kWorthwhile = 1.0 / 16;  // a mean below a quarter of a row's length tightens nothing
  std::vector<float> center(d, 0.f);
  if (square >= kWorthwhile)
    for (size_t j = 0; j < d; ++j) center[j] = float(mean[j]);
  return center;
}

}  // namespace simplexfix::cpu
