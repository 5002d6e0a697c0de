#include "query_codes.h"

#include <cmath>
#include <limits>

#include "float_mode.h"

namespace simplexfix::cpu {
namespace {
constexpr float kInfinity = std::numeric_limits<float>::infinity();
float round_down(double x) { return -round_up(-x); }
}  // namespace

QueryCodes::QueryCodes(const float* query, int64_t n, const GalleryCodes& gallery)
    : d_(gallery.dim()),
      stride_(gallery.groups() * 4),
      codes_(size_t(n * stride_), 0),
      start_(size_t(n)),
      scale_(size_t(n)),
      norm_(size_t(n)),
      residual_(size_t(n)),
      center_dot_(size_t(n)) {
  const IeeeArithmetic ieee;
  const SearchKernels& kernels = search_kernels();
  for (size_t q = 0; q < size_t(n); ++q) {
    const float* row = query + int64_t(q) * d_;
    const CodeSummary code =
        kernels.encode(row, gallery.center(), d_, kernels.query_range, codes_.data() + int64_t(q) * stride_);
    start_[q] = int32_t(-128 * code.sum);  // the panel's codes are stored plus 128 (CodePanel)
    scale_[q] = code.scale;
    norm_[q] = round_up(code.norm);
    residual_[q] = round_up(code.residual);
    double dot = 0;
    for (int64_t j = 0; j < d_; ++j) dot += double(row[j]) * double(gallery.center()[j]);
    center_dot_[q] = dot;
  }
}

CodeQueries QueryCodes::view(const float* cutoff) const {
  return {codes_.data(), stride_, int64_t(start_.size()), start_.data(), scale_.data(), norm_.data(), cutoff};
}

void QueryCodes::panel_cutoffs(const float* cutoff, float panel_norm, float* out) const {
  for (size_t q = 0; q < residual_.size(); ++q) out[q] = cutoff[q] - panel_term(int64_t(q), panel_norm);
}

float QueryCodes::cutoff(int64_t query, float score) const {
  const auto q = size_t(query);
  // A real number below the midpoint of `score` and the next lower float rounds to that float at most.
  const double middle = (double(score) + double(std::nextafter(score, -kInfinity))) / 2;
  // The rounding of the fp64 score, of query . center and of row . center. Each is below (d + 8) * 2^-53 times lengths
  // that sum to less than 8 (norm + |q.center|). Here norm + |q.center| is at least 1 for a query of length 1, since
  // |q|^2 = q.center + q.(q - center). For a zero query the score is exactly 0.
  const double fp64_slack = double(d_ + 64) * 0x1p-50 * (norm_[q] + std::abs(center_dot_[q]));
  return round_down(middle - center_dot_[q] - fp64_slack - 0x1p-100);  // 2^-100: products that underflow
}

}  // namespace simplexfix::cpu
