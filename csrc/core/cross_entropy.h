// Cross-entropy against a fixed classifier: the class vectors are the K vertices of a regular polytope in R^d, a
// simplex, an orthoplex or a cube. Slot c is the class of vertex c. A row z [d] of features has the logits l_c = scale
// * z . v_c, or scale * cosine with normalize.
//
// This file has the scalar math that all polytopes share, for the CPU and CUDA kernels: options, margins, and the loss
// and the label's gradient from a row's softmax sums.
#pragma once
#include <cmath>
#include <cstdint>

#include "exponential.h"
#include "types.h"

namespace simplexfix {

template <typename A>
struct CrossEntropyOptions {
  bool normalize;
  A scale;        // > 0
  Margin margin;  // on the true class, with normalize only
  A margin_size;  // a cosine for kCosine, radians for kAngular
  A smoothing;    // label_smoothing, in [0, 1]
  A weight_sum;   // sum of the K class weights; K without weights
  // cos and sin of margin_size, computed once on the host: on a GPU they need local memory.
  A margin_cosine = std::cos(margin_size);
  A margin_sine = std::sin(margin_size);
};

// Sets with_margin to the true class's cosine with its margin, and slope to d(with_margin) / d(cosine). Beyond theta +
// margin = pi the cosine of an angular margin would rise again, so the margin is additive there, as in ArcFace.
template <typename A>
SIMPLEXFIX_HD void apply_margin(const CrossEntropyOptions<A>& options, A cosine, A* with_margin, A* slope) {
  *with_margin = cosine;
  *slope = A(1);
  if (options.margin == Margin::kCosine) {
    *with_margin = cosine - options.margin_size;
  } else if (options.margin == Margin::kAngular) {
    const A c = cosine > A(1) ? A(1) : cosine < A(-1) ? A(-1) : cosine;
    const A cos_m = options.margin_cosine, sin_m = options.margin_sine;
    if (c > -cos_m) {
      const A floor = A(1e-12), square = (A(1) - c) * (A(1) + c);
      const A sine = std::sqrt(square > floor ? square : floor);
      *with_margin = c * cos_m - rounded(sine * sin_m);
      *slope = cos_m + (square > floor ? c * sin_m / sine : A(0));
    } else {
      *with_margin = c - options.margin_size * sin_m;
    }
  }
}

// Returns upstream / divisor, the factor that turns a gradient of the sum into one of the mean. If no row counts, the
// divisor is 0; the gradient is then 0, not 0 / 0.
template <typename A>
SIMPLEXFIX_HD A divide_upstream(A upstream, A divisor) {
  return divisor == A(0) ? upstream : upstream / divisor;
}

// Returns the factor by which a row is multiplied before its dot products with the unit vertices. squares = |z|^2 is
// read only with normalize.
template <typename A>
SIMPLEXFIX_HD A row_factor(const CrossEntropyOptions<A>& options, A squares, A* inverse_norm) {
  *inverse_norm = A(1);
  if (options.normalize) *inverse_norm = squares > A(0) ? A(1) / std::sqrt(squares) : A(0);
  return options.scale * *inverse_norm;
}

// The label's logit, scale * cosine, with its margin.
template <typename A>
struct LabelLogit {
  A value;   // the logit with its margin
  A margin;  // the logit without margin minus value
  A slope;   // d(value) / d(the logit without margin)
};

template <typename A>
SIMPLEXFIX_HD LabelLogit<A> label_logit(const CrossEntropyOptions<A>& options, A plain) {
  LabelLogit<A> label;
  A with_margin;
  apply_margin(options, plain / options.scale, &with_margin, &label.slope);
  label.value = options.margin == Margin::kNone ? plain : rounded(with_margin * options.scale);
  label.margin = plain - label.value;
  return label;
}

// A row's loss as mass * log(total) + offset. This form lets a CPU kernel compute the logarithms of many rows at once.
template <typename A>
struct RowLoss {
  A mass;   // factor of the softmax in the gradient
  A total;  // sum of exp(l_c - largest) over all classes; the label's logit has its margin
  A offset;

  SIMPLEXFIX_HD A value() const { return mass * std::log(total) + offset; }
};

// The row's loss and the label's gradient. For c != label, dL/dl_c = mass * p_c - smoothing_per_class * w_c.
template <typename A>
struct LabelOutcome {
  RowLoss<A> loss;
  A smoothing_per_class;  // label_smoothing / K
  A gradient;             // dL/d(label's logit with margin)
};

// others: sum of exp(l_c - largest) over all classes but the label. logit_sum: sum_c w_c l_c without margin, read only
// with smoothing. weight_label: 1 without weights.
template <typename A>
SIMPLEXFIX_HD LabelOutcome<A> label_outcome(const CrossEntropyOptions<A>& options, A slots, A largest,
                                            const LabelLogit<A>& label, A others, A logit_sum, A weight_label) {
  LabelOutcome<A> out;
  const A at_label = scalar_exp(label.value - largest), total = others + at_label;
  out.smoothing_per_class = options.smoothing / slots;
  const A mass = (A(1) - options.smoothing) * weight_label + rounded(out.smoothing_per_class * options.weight_sum);
  // rounding is the rounding error of total (Fast2Sum). rounding / total corrects log(total) for it, which matters if
  // the label's logit is by far the largest and the loss is small.
  const A rounding = at_label > others ? others - (total - at_label) : at_label - (total - others);
  A offset = rounded(mass * (rounding / total + (largest - label.value)));
  if (options.smoothing > A(0))
    offset += out.smoothing_per_class * options.weight_sum * label.value -
              rounded(out.smoothing_per_class * (logit_sum - weight_label * label.margin));
  out.loss = {mass, total, offset};
  // mass * p_y - target_y, computed from p_y or from 1 - p_y, whichever form does not cancel.
  out.gradient =
      at_label < others
          ? mass * (at_label / total) - rounded((A(1) - options.smoothing + out.smoothing_per_class) * weight_label)
          : rounded(out.smoothing_per_class * (options.weight_sum - weight_label)) - mass * (others / total);
  return out;
}

}  // namespace simplexfix
