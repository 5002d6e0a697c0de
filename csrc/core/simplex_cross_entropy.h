// The scalar math of one row of simplex cross-entropy, shared by the CPU and CUDA kernels.
//
// A row takes two reductions and one elementwise step. Reduction 1 accumulates RowSums; row_logits() turns them into
// the affine map from z to logits. Reduction 2 sums exp(l_i - largest) over all i < d but the label; row_outcome()
// turns that sum into the loss and the constants of the gradient. The elementwise step writes the gradient:
//
//   g_j = exponential * exp(l_j - largest) + constant - weight * w_j     for j < d, j != label
//   g_label = label                                                      if label < d
//
// The term weight * w_j is present with class weights and label smoothing; without class weights it is the same for all
// j and part of constant. dL/dz is g, or with normalize its projection.
//
// The CUDA kernels read the row once for each of the three (cuda/cross_entropy.cuh). The CPU kernel computes both
// reductions in one pass over the row (cpu/simplex_cross_entropy.inc).
//
// The maximum and the sum of exponentials skip the label, because a margin shifts its logit. Also, a confident row has
// a small loss and a small gradient. They keep full relative precision because they are computed from the sum over the
// other classes, and not from 1 - p.
#pragma once
#include <cmath>
#include <cstdint>

#include "cross_entropy.h"
#include "simplex.h"

namespace simplexfix {

template <typename A>
struct RowSums {
  A sum;      // sum_j z_j
  A squares;  // sum_j z_j^2, with normalize
  // max z_i over i < d other than the label, -inf if there is none; or another number so near to it that the sum of
  // exp(l_i - largest) neither overflows nor underflows
  A largest;
  A weighted;  // sum_j w_j z_j over j < d, with class weights and smoothing
};

template <typename A>
struct RowLogits {
  A factor, shift;  // l_i = factor * z_i - shift for i < d
  A last;           // l_d
  LabelLogit<A> label;
  A largest;       // of all logits, the label's with its margin; at least the logit of RowSums::largest
  A inverse_norm;  // 1 / |z|, 0 for a zero row; 1 without normalize
};

// Returns the factor of z in the logits of a row. squares is read only with normalize.
template <typename A>
SIMPLEXFIX_HD A logit_factor(const std::common_type_t<RoundedSimplex<A>>& simplex,
                             const CrossEntropyOptions<A>& options, A squares, A* inverse_norm) {
  return row_factor(options, squares, inverse_norm) * simplex.inverse_r;
}

// z_label: z at the label, read only if label < d. std::common_type_t prevents deduction, so that a Simplex converts to
// its rounded form.
template <typename A>
SIMPLEXFIX_HD RowLogits<A> row_logits(const std::common_type_t<RoundedSimplex<A>>& simplex,
                                      const CrossEntropyOptions<A>& options, const RowSums<A>& sums, int64_t d,
                                      int64_t label, A z_label) {
  RowLogits<A> row;
  row.factor = logit_factor(simplex, options, sums.squares, &row.inverse_norm);
  row.shift = rounded(row.factor * simplex.m * sums.sum);
  row.last = rounded(row.factor * simplex.last * sums.sum);
  row.label = label_logit(options, label < d ? row.factor * z_label - row.shift : row.last);
  row.largest = row.factor * sums.largest - row.shift;    // -inf if K = 2 leaves no other i < d
  if (!(row.factor > A(0)) && d > 1) row.largest = A(0);  // zero row under normalize: avoid 0 * inf
  if (label < d && !(row.largest >= row.last)) row.largest = row.last;
  if (!(row.largest >= row.label.value)) row.largest = row.label.value;
  return row;
}

template <typename A>
struct RowOutcome {
  RowLoss<A> loss;
  A exponential, constant, weight, label;  // of the gradient above, times upstream
};

// sum_exp_others: the result of reduction 2. weighted: whether RowSums::weighted is set. weight_label, weight_last: 1
// without weights.
template <typename A>
SIMPLEXFIX_HD RowOutcome<A> row_outcome(const std::common_type_t<RoundedSimplex<A>>& simplex,
                                        const CrossEntropyOptions<A>& options, const RowSums<A>& sums,
                                        const RowLogits<A>& row, int64_t d, int64_t label, A sum_exp_others,
                                        bool weighted, A weight_label, A weight_last, A upstream) {
  const A last = scalar_exp(row.last - row.largest);
  const A others = label < d ? sum_exp_others + last : sum_exp_others;
  // sum_c w_c l_c. Without weights the logits sum to zero, since the vertices do.
  const A logit_sum = weighted ? row.factor * sums.weighted - rounded(row.shift * (options.weight_sum - weight_last)) +
                                     rounded(row.last * weight_last)
                               : A(0);
  const auto at = label_outcome(options, A(d + 1), row.largest, row.label, others, logit_sum, weight_label);
  const A g_label = rounded(at.gradient * row.label.slope);
  const A excess = at.gradient * (row.label.slope - A(1));  // sum of all g: zero without an angular margin
  const A g_last =
      label < d ? at.loss.mass * (last / at.loss.total) - rounded(at.smoothing_per_class * weight_last) : g_label;
  const A common = simplex.a * g_last - rounded(simplex.m * excess);
  const A factor = upstream * row.factor;
  RowOutcome<A> out;
  out.loss = at.loss;
  out.exponential = factor * at.loss.mass / at.loss.total;
  out.constant = factor * (weighted ? common : common - at.smoothing_per_class);
  out.weight = factor * at.smoothing_per_class;
  out.label = factor * (g_label + common);
  return out;
}

}  // namespace simplexfix
