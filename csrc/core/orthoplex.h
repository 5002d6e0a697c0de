// The scalar math of one row of orthoplex cross-entropy. Of the K = 2d vertices, slot c < d is +e_c and slot d + c is
// -e_c, so the logits are factor * [z, -z].
//
// A row takes two reductions and one elementwise step. Reduction 1 finds the largest |z_j|; orthoplex_row() turns it
// into `largest`. Reduction 2 sums exp(f |z_j| - largest) + exp(-f |z_j| - largest), f = factor, over all coordinates
// but the label's. orthoplex_outcome() turns that sum into the loss and the constants of the gradient:
//
//   dL/dz_j = exponential * (exp(f z_j - largest) - exp(-f z_j - largest)) - weight * (w_j - w_{d+j})
//   dL/dz_j = label                                                          at the label's coordinate
//
// Both reductions skip the label's coordinate, and so the label's opposite. core/simplex_cross_entropy.h explains why.
#pragma once
#include <cmath>
#include <cstdint>

#include "cross_entropy.h"

namespace simplexfix {

template <typename A>
struct OrthoplexRow {
  A factor;    // the logits are factor * [z, -z]
  A opposite;  // the logit of the label's opposite
  LabelLogit<A> label;
  A largest;       // the largest logit; the label's logit includes its margin
  A inverse_norm;  // 1 / |z|, 0 for a zero row; 1 without normalize
};

// largest: max |z_j| over all coordinates but the label's, -inf if there is none. z_label: z at the label's coordinate,
// times the sign of the label's vertex.
template <typename A>
SIMPLEXFIX_HD OrthoplexRow<A> orthoplex_row(const CrossEntropyOptions<A>& options, A squares, A largest, A z_label) {
  OrthoplexRow<A> row;
  row.factor = row_factor(options, squares, &row.inverse_norm);
  const A plain = rounded(row.factor * z_label);
  row.label = label_logit(options, plain);
  row.opposite = -plain;
  row.largest = row.factor > A(0) ? rounded(row.factor * largest) : A(0);  // zero row: avoid 0 * inf
  if (!(row.largest >= row.opposite)) row.largest = row.opposite;
  if (!(row.largest >= row.label.value)) row.largest = row.label.value;
  return row;
}

template <typename A>
struct OrthoplexOutcome {
  RowLoss<A> loss;
  A exponential, weight, label;  // of the gradient above, times upstream
};

// sum_exp_others: the result of reduction 2. weighted: sum_j (w_j - w_{d+j}) z_j, 0 without weights. sign: the sign of
// the label's vertex. weight_label, weight_opposite: 1 without weights.
template <typename A>
SIMPLEXFIX_HD OrthoplexOutcome<A> orthoplex_outcome(const CrossEntropyOptions<A>& options, const OrthoplexRow<A>& row,
                                                    int64_t d, A sign, A sum_exp_others, A weighted, A weight_label,
                                                    A weight_opposite, A upstream) {
  const A opposite = scalar_exp(row.opposite - row.largest);
  const auto at = label_outcome(options, A(2 * d), row.largest, row.label, sum_exp_others + opposite,
                                row.factor * weighted, weight_label);
  const A g_opposite = at.loss.mass * (opposite / at.loss.total) - rounded(at.smoothing_per_class * weight_opposite);
  const A factor = upstream * row.factor;
  OrthoplexOutcome<A> out;
  out.loss = at.loss;
  out.exponential = factor * at.loss.mass / at.loss.total;
  out.weight = factor * at.smoothing_per_class;
  out.label = factor * sign * (at.gradient * row.label.slope - g_opposite);
  return out;
}

}  // namespace simplexfix
