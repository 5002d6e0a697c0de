#include "gallery_codes.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "aligned.h"
#include "float_mode.h"

namespace simplexfix::cpu {
namespace {
constexpr size_t kChunkBytes = size_t(1) << 18;
// A chunk of huge pages has at least kHugePanels panels, so less than a 32nd of it is unused. A gallery as large as
// kManyChunks such chunks allocates a whole further one even for a single panel. So growth row by row uses huge pages.
constexpr size_t kHugePanels = 32, kManyChunks = 16;
// A gallery's codes are in [-kRange, kRange]. They are stored plus 128, because the products need them unsigned.
constexpr int kRange = 127;

// The first pass rounds its upper bound. The bound is a float sum of dot * scale_r * scale_q, offset and error *
// norm_q. It takes at most eight operations, so its error is below 2^-21 of the sum of their magnitudes. |coded y| <= 2
// |y|, because a code is nonzero only if the number is at least half a step. So this rounding is covered by
// 2^-19 |coded x| |y|, which the error includes, and the 2^-20 that round_up() adds to each term.
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
      chunk_panels_(std::max<size_t>(1, kChunkBytes / panel_bytes_)),
      huge_bytes_(std::max(whole_huge_pages(kHugePanels * panel_bytes_), kLeastHugeBlock)),
      huge_panels_(huge_bytes_ / panel_bytes_),
      center_(std::move(center)) {}

size_t GalleryCodes::bytes() const {
  size_t sum = panels_.capacity() * sizeof(std::byte*) + (panel_norm_.capacity() + center_.capacity()) * sizeof(float);
  for (const Chunk& chunk : chunks_) sum += chunk.bytes;
  return sum;
}

CodePanel GalleryCodes::panel(int64_t index) const {
  const std::byte* data = panels_[size_t(index)];
  const auto* numbers = reinterpret_cast<const float*>(data + kPanelRows * groups_ * 4);
  return {reinterpret_cast<const uint8_t*>(data), numbers, numbers + kPanelRows, numbers + 2 * kPanelRows};
}

// Allocates memory until there are this many panels. Of the new chunks, those of huge pages come last. The last chunks
// are freed first, so little unused memory remains when most rows are removed.
void GalleryCodes::allocate(size_t panels) {
  while (panels_.size() < panels) {
    const size_t missing = panels - panels_.size(), others = missing % huge_panels_;
    size_t n = chunk_panels_;
    if (missing >= huge_panels_)
      n = others == 0 ? huge_panels_ : std::min(n, others);
    else if (panels_.size() >= kManyChunks * huge_panels_)
      n = huge_panels_;
    const size_t bytes = n == huge_panels_ ? huge_bytes_ : n * panel_bytes_;
    chunks_.reserve(chunks_.size() + 1);
    auto* memory = static_cast<std::byte*>(allocate_pages(bytes));
    if (!memory) throw std::bad_alloc();
    chunks_.push_back({std::unique_ptr<std::byte[], Free>(memory), bytes, panels_.size()});
    for (size_t i = 0; i < n; ++i) panels_.push_back(memory + i * panel_bytes_);
  }
}

// Frees the chunks that begin at this panel or later.
void GalleryCodes::free_from(size_t panel) {
  while (!chunks_.empty() && chunks_.back().first >= panel) {
    panels_.resize(chunks_.back().first);
    chunks_.pop_back();
  }
}

void GalleryCodes::resize(int64_t n) {
  const int64_t panels = ceil_div(n, kPanelRows), before = ceil_div(size_, kPanelRows);
  try {
    allocate(size_t(panels));
    panel_norm_.resize(size_t(panels), 0.f);
  } catch (...) {
    free_from(size_t(before));
    throw;
  }
  free_from(size_t(panels));
  for (int64_t p = before; p < panels; ++p) {  // codes of 0, bounds of 0: rows past the end are masked out
    std::byte* const data = panels_[size_t(p)];
    std::memset(data, 128, size_t(kPanelRows * groups_ * 4));
    std::memset(data + kPanelRows * groups_ * 4, 0, 3 * kPanelRows * sizeof(float));
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
    std::byte* data = panels_[size_t(panel)];
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
