// The scalar mathematics of one row of the old/new contrast, shared by the CPU and CUDA kernels.
//
//   s_j = mu (anchor . candidate_j) / (|anchor| |candidate_j|), "differs": candidates of other classes
//   zero_mask  -s_own + log(sum over differs of exp(s_j) + the number of the others)
//   remove     -s_own + log(sum over differs of exp(s_j)),  -s_own where none differs
//   infonce    -s_own + log(exp(s_own) + sum over differs of exp(s_j))
#pragma once
#include <cmath>
#include <limits>

#include "types.h"

namespace simplexfix {

// What a row's exponentials are relative to: exp must not overflow for the terms besides the candidates either.
// largest is that of all s_j that differ, -inf where none does.
template <typename A>
SIMPLEXFIX_HD A contrast_top(Negatives negatives, A largest, A own) {
  A top = largest;
  if (negatives == Negatives::kZeroMask && top < A(0)) top = A(0);
  if (negatives == Negatives::kInfoNce && top < own) top = own;
  return top;
}

template <typename A>
struct ContrastOutcome {
  A loss;
  A total;    // dL/ds_j = exp(s_j - top) / total for j that differs
  A missing;  // dL/ds_own = -missing
};

// others = sum of exp(s_j - top) over those that differ; same = the number of the rest, the own one among them;
// alone: none differs.
template <typename A>
SIMPLEXFIX_HD ContrastOutcome<A> contrast_outcome(Negatives negatives, A top, A own, A others, A same, bool alone) {
  A total = others, loss;
  if (negatives == Negatives::kZeroMask) total += same * std::exp(-top);
  if (negatives == Negatives::kInfoNce) total += std::exp(own - top);
  if (negatives == Negatives::kInfoNce && top == own)
    loss = std::log1p(others);  // a small loss keeps its digits
  else if (negatives == Negatives::kRemove && alone)
    loss = -own, total = A(1);
  else
    loss = std::log(total) + (top - own);
  return {loss, total, negatives == Negatives::kInfoNce ? others / total : A(1)};  // 1 - p_own
}

}  // namespace simplexfix
