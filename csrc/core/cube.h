// The scalar math of one row of cube cross-entropy. The K = 2^d vertices are s / sqrt(d), s in {-1, 1}^d, all of them
// in the softmax. The sum over vertices factorizes into a product over coordinates. With s the label's signs:
//
//   f = scale / sqrt(d), divided by |z| with normalize;  x_j = -2 f s_j z_j
//   gap = logsumexp(l) - l_y = sum_j log(1 + exp(x_j))                                   without a margin
//   dL/dz_j = s_j * (constant - coefficient * sigmoid(x_j))
//
// The label's logit is subtracted before any rounding: every term of gap is positive, so nothing cancels. A margin
// lowers only l_y, by delta: exp(gap') - 1 = (exp(gap) - 1) * exp(delta).
#pragma once
#include <cmath>
#include <cstdint>

#include "cross_entropy.h"

namespace simplexfix {

template <typename A>
struct CubeRow {
  A factor;  // f
  LabelLogit<A> label;
  A inverse_norm;  // 1 / |z|, 0 for a zero row; 1 without normalize
};

// dot = sum_j s_j z_j
template <typename A>
SIMPLEXFIX_HD CubeRow<A> cube_row(const CrossEntropyOptions<A>& options, A squares, A inverse_sqrt_d, A dot) {
  CubeRow<A> row;
  row.factor = row_factor(options, squares, &row.inverse_norm) * inverse_sqrt_d;
  row.label = label_logit(options, row.factor * dot);
  return row;
}

// gap: logsumexp - l_y with the margin. ratio: the factor by which the margin scales sigmoid(x_j) in the gradient.
template <typename A>
struct CubeGap {
  A gap, ratio;
};

// Below this, exp(gap) - 1 has too few bits to be multiplied by exp(delta); use cube_gap_of_flips instead. A is the
// type in which the exponentials are computed.
template <typename A>
constexpr double kLeastCubeGap = std::is_same_v<A, double> ? 1e-150 : 1e-18;

template <typename A>
SIMPLEXFIX_HD CubeGap<A> cube_gap(A gap, A delta) {
  if (gap < A(1)) {
    const A half = std::exp(delta / A(2)), odds = std::expm1(gap) * half * half;
    if (std::isinf(odds)) return {std::log(std::expm1(gap)) + delta, std::exp(gap) / std::expm1(gap)};
    return {std::log1p(odds), std::exp(gap) * half / (A(1) + odds) * half};
  }
  const A shift = std::exp(-gap) * std::expm1(-delta);
  return {gap + delta + std::log1p(shift), A(1) / (A(1) + shift)};
}

// The gap and ratio for a gap below kLeastCubeGap. There every x_j is far below 0, and exp(gap) - 1 is the sum of
// exp(x_j) over the vertices that differ from the label's in one coordinate. flips: sum_j exp(x_j - largest). The
// kernel uses these terms in place of sigmoid(x_j).
template <typename A>
SIMPLEXFIX_HD CubeGap<A> cube_gap_of_flips(A largest, A flips, A delta) {
  const A odds = (largest + delta) + std::log(flips);
  const A with_margin = odds > A(0) ? odds + std::log1p(std::exp(-odds)) : std::log1p(std::exp(odds));
  return {with_margin, std::exp((largest + delta) - with_margin)};
}

template <typename A>
struct CubeOutcome {
  A loss;
  A constant, coefficient;  // of the gradient above, times upstream
};

// inverse_slots: 2^-d. Label smoothing covers all vertices; their logits sum to -delta, since the vertices sum to zero.
// weight_label: 1 without weights, and with smoothing.
template <typename A>
SIMPLEXFIX_HD CubeOutcome<A> cube_outcome(const CrossEntropyOptions<A>& options, const CubeRow<A>& row,
                                          const CubeGap<A>& at, A inverse_slots, A weight_label, A upstream) {
  const A label_mass = (A(1) - options.smoothing) * weight_label, mass = label_mass + options.smoothing;
  const A smoothing_per_class = options.smoothing * inverse_slots;
  CubeOutcome<A> out;
  out.loss = label_mass * at.gap;
  if (options.smoothing > A(0))
    out.loss += options.smoothing * (at.gap + row.label.value) + smoothing_per_class * row.label.margin;
  const A factor = upstream * row.factor;
  out.constant = factor * options.smoothing;
  if (options.margin == Margin::kAngular) {
    // dL/dl_y = mass * p_y - label_mass - smoothing_per_class, computed from 1 - p_y.
    const A g_label = (options.smoothing - smoothing_per_class) + mass * std::expm1(-at.gap);
    out.constant += factor * (row.label.slope - A(1)) * g_label;
  }
  out.coefficient = factor * A(2) * mass * at.ratio;
  return out;
}

}  // namespace simplexfix
