// The scalar mathematics of one row of simplex cross-entropy, shared by the CPU and CUDA kernels.
//
// A kernel sweeps the row twice.  The first sweep gathers RowSums; row_logits() turns them into the
// affine map from z to logits.  The second adds up exp(l_i - largest) of all i < d but the label;
// row_outcome() turns that into the loss and into the few numbers from which every dL/dz_j follows:
//
//   dL/dz_j = exponential * exp(l_j - largest) + constant - weight * w_j     for j != label
//   dL/dz_y = label
//
// The label stays out of both sweeps: a margin moves it, and a confident row keeps its small loss
// (log1p) and its small gradient (no 1 - p) to full relative precision.
#pragma once
#include <cmath>
#include <cstdint>

#include "simplex.h"

namespace simplexfix {

template <typename A>
struct CrossEntropyOptions {
  bool normalize;
  A scale;        // > 0
  Margin margin;  // on the true class, with normalize only
  A margin_size;  // a cosine, or radians
  A smoothing;    // label_smoothing, in [0, 1]
  A weight_sum;   // of the K class weights; K where there are none
  // Of margin_size, found once here: sin and cos of any number need local memory on a GPU.
  A margin_cosine = std::cos(margin_size);
  A margin_sine = std::sin(margin_size);
};

template <typename A>
struct RowSums {
  A sum;       // sum_j z_j
  A squares;   // sum_j z_j^2, with normalize
  A largest;   // max of z_i over i < d other than the label; -inf where there is none
  A weighted;  // sum_j w_j z_j over j < d, with class weights and smoothing
};

template <typename A>
struct RowLogits {
  A factor, shift;  // l_i = factor * z_i - shift for i < d
  A last;           // l_d
  A label;          // l_y, the margin taken off
  A margin;         // how much the margin took off
  A slope;          // d(l_y with margin) / d(l_y without)
  A largest;        // of all logits, the label's with its margin
  A inverse_norm;   // 1 / |z|, 0 for a zero row; 1 without normalize
};

// The cosine c of the true class with its margin, and the derivative of that by c.  Angular: beyond
// theta + margin = pi the cosine would rise again, so there the margin becomes additive, as in ArcFace.
template <typename A>
SIMPLEXFIX_HD void apply_margin(const CrossEntropyOptions<A>& options, A cosine, A* moved, A* slope) {
  *moved = cosine;
  *slope = A(1);
  if (options.margin == Margin::kCosine) {
    *moved = cosine - options.margin_size;
  } else if (options.margin == Margin::kAngular) {
    const A c = cosine > A(1) ? A(1) : cosine < A(-1) ? A(-1) : cosine;
    const A cos_m = options.margin_cosine, sin_m = options.margin_sine;
    if (c > -cos_m) {
      const A floor = A(1e-12), square = (A(1) - c) * (A(1) + c);
      const A sine = std::sqrt(square > floor ? square : floor);
      *moved = c * cos_m - sine * sin_m;
      *slope = cos_m + (square > floor ? c * sin_m / sine : A(0));
    } else {
      *moved = c - options.margin_size * sin_m;
    }
  }
}

// What z is multiplied by in the logits of a row; squares is read only with normalize.
template <typename A>
SIMPLEXFIX_HD A logit_factor(const std::common_type_t<RoundedSimplex<A>>& simplex,
                             const CrossEntropyOptions<A>& options, A squares, A* inverse_norm) {
  *inverse_norm = A(1);
  if (options.normalize) *inverse_norm = squares > A(0) ? A(1) / std::sqrt(squares) : A(0);
  return options.scale * *inverse_norm * simplex.inverse_r;
}

// z_label is z at the label, read only where label < d.  (common_type_t: not deduced, so that a
// Simplex may stand for its rounded form.)
template <typename A>
SIMPLEXFIX_HD RowLogits<A> row_logits(const std::common_type_t<RoundedSimplex<A>>& simplex,
                                      const CrossEntropyOptions<A>& options, const RowSums<A>& sums, int64_t d,
                                      int64_t label, A z_label) {
  RowLogits<A> row;
  row.factor = logit_factor(simplex, options, sums.squares, &row.inverse_norm);
  row.shift = row.factor * simplex.m * sums.sum;
  row.last = row.factor * simplex.last * sums.sum;
  const A plain = label < d ? row.factor * z_label - row.shift : row.last;
  A moved;
  apply_margin(options, plain / options.scale, &moved, &row.slope);
  row.label = options.margin == Margin::kNone ? plain : moved * options.scale;
  row.margin = plain - row.label;
  row.largest = row.factor * sums.largest - row.shift;    // -inf where K = 2 leaves no other row below d
  if (!(row.factor > A(0)) && d > 1) row.largest = A(0);  // a zero row under normalize, never 0 * inf
  if (label < d && !(row.largest >= row.last)) row.largest = row.last;
  if (!(row.largest >= row.label)) row.largest = row.label;
  return row;
}

template <typename A>
struct RowOutcome {
  A loss;
  A exponential, constant, weight, label;  // of the gradient, times upstream
};

// rest = sum of exp(l_i - largest) over i < d other than the label; weight_* are 1 without weights;
// weighted tells whether RowSums::weighted holds the class weights' sum.
template <typename A>
SIMPLEXFIX_HD RowOutcome<A> row_outcome(const std::common_type_t<RoundedSimplex<A>>& simplex,
                                        const CrossEntropyOptions<A>& options, const RowSums<A>& sums,
                                        const RowLogits<A>& row, int64_t d, int64_t label, A rest, bool weighted,
                                        A weight_label, A weight_last, A upstream) {
  const A last = std::exp(row.last - row.largest), at_label = std::exp(row.label - row.largest);
  const A others = label < d ? rest + last : rest;
  const A total = others + at_label;
  const A gap = row.largest == row.label ? std::log1p(others)  // logsumexp - l_y
                                         : std::log(total) + (row.largest - row.label);
  const A share = options.smoothing / A(d + 1);
  RowOutcome<A> out;
  out.loss = (A(1) - options.smoothing) * weight_label * gap;
  if (options.smoothing > A(0)) {
    // sum_c w_c l_c; without weights the logits sum to zero, since the vertices do
    const A sum =
        weighted ? row.factor * sums.weighted - row.shift * (options.weight_sum - weight_last) + row.last * weight_last
                 : A(0);
    out.loss += share * (options.weight_sum * (gap + row.label) - (sum - weight_label * row.margin));
  }
  const A mass = (A(1) - options.smoothing) * weight_label + share * options.weight_sum;
  // g_y = mass * p_y - target_y in the form that does not cancel: by p_y, or by 1 - p_y
  const A plain = at_label < others ? mass * (at_label / total) - (A(1) - options.smoothing + share) * weight_label
                                    : share * (options.weight_sum - weight_label) - mass * (others / total);
  const A g_label = plain * row.slope;
  const A excess = plain * (row.slope - A(1));  // sum of all g: zero without an angular margin
  const A g_last = label < d ? mass * (last / total) - share * weight_last : g_label;
  const A common = simplex.a * g_last - simplex.m * excess;
  const A factor = upstream * row.factor;
  out.exponential = factor * mass / total;
  out.constant = factor * (weighted ? common : common - share);
  out.weight = factor * share;
  out.label = factor * (g_label + common);
  return out;
}

}  // namespace simplexfix
