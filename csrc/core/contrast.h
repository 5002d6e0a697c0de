// The old/new contrast compares features of one model (anchors) with features of another (candidates); see
// docs/design/math.md. This file has the scalar math of one row, that is of one anchor, for the CPU and CUDA kernels.
//
//   s_j        mu (anchor . candidate_j) / (|anchor| |candidate_j|); mu is the inverse temperature
//   N          the candidates whose class differs from the anchor's
//   own        the candidate that is the same item as the anchor, and so has its class
//
//   zero_mask  loss = -s_own + log(sum over N of exp(s_j) + number of candidates outside N): their s_j are set to 0
//   remove     loss = -s_own + log(sum over N of exp(s_j)), or -s_own if N is empty
//   infonce    loss = -s_own + log(exp(s_own) + sum over N of exp(s_j))
#pragma once
#include <cmath>
#include <limits>

#include "types.h"

namespace simplexfix {

// Returns the shift of a row's exponentials: the largest exponent in the sum, so that exp cannot overflow. largest is
// the largest s_j in N, -inf if N is empty.
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
  A total;    // dL/ds_j = exp(s_j - top) / total for j in N
  A missing;  // dL/ds_own = -missing: 1 - exp(s_own - top) / total for infonce, else 1
};

// others: sum of exp(s_j - top) over N. same: the number of candidates outside N, own included. alone: N is empty.
template <typename A>
SIMPLEXFIX_HD ContrastOutcome<A> contrast_outcome(Negatives negatives, A top, A own, A others, A same, bool alone) {
  A total = others, loss;
  if (negatives == Negatives::kZeroMask) total += same * std::exp(-top);
  if (negatives == Negatives::kInfoNce) total += std::exp(own - top);
  if (negatives == Negatives::kInfoNce && top == own)
    loss = std::log1p(others);  // log1p keeps the relative precision of a small loss
  else if (negatives == Negatives::kRemove && alone)
    loss = -own, total = A(1);
  else
    loss = std::log(total) + (top - own);
  return {loss, total, negatives == Negatives::kInfoNce ? others / total : A(1)};
}

}  // namespace simplexfix
