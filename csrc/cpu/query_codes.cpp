#include "query_codes.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "float_mode.h"

namespace simplexfix::cpu {
namespace {
constexpr int kMaxRange = 127;  // a query's codes are in [-kMaxRange, kMaxRange]
constexpr float kInfinity = std::numeric_limits<float>::infinity();
float round_down(double x) { return -round_up(-x); }

// Returns range, or a lower one if codes of this range exceed the limits.
int within_limits(const int8_t* codes, int64_t groups, const CodeLimits& limits, int range) {
  int pair = 0, run = 0;  // the largest sums
  for (int64_t first = 0; first < groups; first += limits.run_groups) {
    int sum[2] = {};
    for (int64_t i = 2 * first; i < 2 * std::min(groups, first + limits.run_groups); ++i) {
      const int both = std::abs(codes[2 * i]) + std::abs(codes[2 * i + 1]);
      pair = std::max(pair, both);
      sum[i % 2] += both;
    }
    run = std::max({run, sum[0], sum[1]});
  }
  if (pair <= limits.pair && run <= limits.run) return range;
  return std::min({range - 1, range * limits.pair / pair, range * limits.run / run});
}
}  // namespace

QueryCodes::QueryCodes(const float* query, int64_t n, const GalleryCodes& gallery)
    : d_(gallery.dim()),
      stride_(gallery.groups() * 4),
      runs_(search_kernels().limits.run_groups > 1 ? gallery.groups() / search_kernels().limits.run_groups : 0),
      codes_(size_t(n * stride_), 0),
      start_(size_t(n)),
      run_start_(size_t(n * runs_)),
      scale_(size_t(n)),
      norm_(size_t(n)),
      residual_(size_t(n)),
      center_dot_(size_t(n)) {
  const IeeeArithmetic ieee;
  const SearchKernels& kernels = search_kernels();
  for (size_t q = 0; q < size_t(n); ++q) {
    const float* row = query + int64_t(q) * d_;
    int8_t* codes = codes_.data() + int64_t(q) * stride_;
    CodeSummary code = kernels.encode(row, gallery.center(), d_, kMaxRange, codes);
    for (int range = kMaxRange, lower; (lower = within_limits(codes, gallery.groups(), kernels.limits, range)) < range;
         range = lower)
      code = kernels.encode(row, gallery.center(), d_, lower, codes);
    start_[q] = int32_t(-128 * code.sum);
    for (int64_t run = 0; run < runs_; ++run) {
      const int8_t* first = codes + run * kernels.limits.run_groups * 4;
      int sum[2] = {};
      for (int i = 0; i < kernels.limits.run_groups * 4; ++i) sum[i / 2 % 2] += first[i];
      const uint16_t lanes[2] = {uint16_t(-128 * sum[0]), uint16_t(-128 * sum[1])};
      std::memcpy(&run_start_[q * size_t(runs_) + size_t(run)], lanes, sizeof lanes);
      start_[q] += 128 * (sum[0] + sum[1]);
    }
    scale_[q] = code.scale;
    norm_[q] = round_up(code.norm);
    residual_[q] = round_up(code.residual);
    double dot = 0;
    for (int64_t j = 0; j < d_; ++j) dot += double(row[j]) * double(gallery.center()[j]);
    center_dot_[q] = dot;
  }
}

CodeQueries QueryCodes::view(const float* cutoff) const {
  return {codes_.data(),     stride_,       int64_t(start_.size()), start_.data(),
          run_start_.data(), scale_.data(), norm_.data(),           cutoff};
}

void QueryCodes::panel_cutoffs(const float* cutoff, float panel_norm, float* out) const {
  for (size_t q = 0; q < residual_.size(); ++q) out[q] = cutoff[q] - panel_term(int64_t(q), panel_norm);
}

float QueryCodes::cutoff(int64_t query, float score) const {
  const auto q = size_t(query);
  // A real number below the midpoint of `score` and the next lower float rounds to that float at most.
  const double middle = (double(score) + double(std::nextafter(score, -kInfinity))) / 2;
  // fp64_slack covers the rounding errors of the fp64 score, query . center and row . center. Each is below
  // (d + 8) * 2^-53 times lengths that sum to less than 8 (norm + |q.center|). norm + |q.center| is at least 1 for a
  // query of length 1, since |q|^2 = q.center + q.(q - center). For a zero query the score is exactly 0.
  const double fp64_slack = double(d_ + 64) * 0x1p-50 * (norm_[q] + std::abs(center_dot_[q]));
  return round_down(middle - center_dot_[q] - fp64_slack - 0x1p-100);  // 2^-100 covers products that underflow
}

}  // namespace simplexfix::cpu
