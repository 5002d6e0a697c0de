// Orthoplex cross-entropy of a row, for the kernels of cross_entropy.cuh. core/orthoplex.h has the math.
#pragma once
#include "../core/orthoplex.h"
#include "cross_entropy.cuh"

namespace simplexfix::cuda {

template <typename A>
struct OrthoplexSums {
  A squares;   // sum_j z_j^2
  A largest;   // max |z_j| over all coordinates but the label's, -inf if there is none
  A weighted;  // sum_j (w_j - w_{d+j}) z_j, with class weights and smoothing
};
template <typename A>
__device__ __forceinline__ OrthoplexSums<A> combine(const OrthoplexSums<A>& a, const OrthoplexSums<A>& b) {
  return {a.squares + b.squares, a.largest > b.largest ? a.largest : b.largest, a.weighted + b.weighted};
}
template <typename A>
__device__ __forceinline__ OrthoplexSums<A> from_lane_xor(const OrthoplexSums<A>& v, int mask) {
  return {from_lane_xor(v.squares, mask), from_lane_xor(v.largest, mask), from_lane_xor(v.weighted, mask)};
}

// Sums over all coordinates j except the label's, with l_j = factor z_j, e+ = exp(l_j - largest) and e- = exp(-l_j -
// largest). sum_exp_others: sum of e+ + e-. dot: sum of (e+ - e-) z_j.
template <typename A>
struct OrthoplexTerms {
  A sum_exp_others, dot;
};
template <typename A>
__device__ __forceinline__ OrthoplexTerms<A> combine(const OrthoplexTerms<A>& a, const OrthoplexTerms<A>& b) {
  return {a.sum_exp_others + b.sum_exp_others, a.dot + b.dot};
}
template <typename A>
__device__ __forceinline__ OrthoplexTerms<A> from_lane_xor(const OrthoplexTerms<A>& v, int mask) {
  return {from_lane_xor(v.sum_exp_others, mask), from_lane_xor(v.dot, mask)};
}

template <typename A>
class OrthoplexLoss {
 public:
  struct Constants {};
  using Sums = OrthoplexSums<A>;
  using Terms = OrthoplexTerms<A>;

  template <typename T>
  __device__ OrthoplexLoss(const LossRow<A>& row, const Constants&, const T* z)
      : row_(row),
        positive_(row.slot() < row.d),
        label_(int((positive_ ? row.slot() : row.slot() - row.d) - row.begin)),
        z_label_(A(z[row.begin + label_])) {}

  __device__ static Sums no_sums() { return {A(0), A(-INFINITY), A(0)}; }

  // x is z_j in this function, in the other accumulate, and in gradient.
  __device__ void accumulate(Sums* sums, int j, A x) const {
    const A magnitude = std::fabs(x);
    sums->squares += x * x;
    if (j != label_ && magnitude > sums->largest) sums->largest = magnitude;
    if (row_.weighted()) sums->weighted += x * weight_of_pair(j);
  }

  __device__ void set_sums(const Sums& sums) {
    at_ = orthoplex_row(row_.options, sums.squares, sums.largest, positive_ ? z_label_ : -z_label_);
  }

  __device__ void accumulate(Terms* terms, int j, A x) const {
    if (j == label_) return;  // the label's exponentials may overflow
    const A logit = std::fabs(x) * at_.factor;
    const A toward = std::exp(logit - at_.largest), away = std::exp(-logit - at_.largest);
    terms->sum_exp_others += toward + away;
    terms->dot += (toward - away) * std::fabs(x);
  }
  __device__ void finalize(Terms*) const {}

  __device__ A compute_loss(const Sums& sums, const Terms& terms) {
    const int64_t slot = row_.slot();
    const int64_t opposite = positive_ ? slot + row_.d : slot - row_.d;
    const A weight_label = row_.weight ? row_.weight[slot] : A(1);
    const A weight_opposite = row_.weight ? row_.weight[opposite] : A(1);
    const A sign = positive_ ? A(1) : A(-1);
    outcome_ = orthoplex_outcome(row_.options_with_weights(), at_, row_.d, sign, terms.sum_exp_others, sums.weighted,
                                 weight_label, weight_opposite, row_.upstream());
    projection_ = A(0);  // (z . g) / |z|^2, where g already has the factor 1 / |z|
    if (row_.options.normalize) {
      A dot = outcome_.exponential * terms.dot;
      if (row_.weighted())
        dot -= outcome_.weight * (sums.weighted - sign * (weight_label - weight_opposite) * z_label_);
      dot += outcome_.label * z_label_;
      projection_ = dot * (at_.inverse_norm * at_.inverse_norm);
    }
    return outcome_.loss.value();
  }

  __device__ A gradient(int j, A x) const {
    const A logit = x * at_.factor;
    A g = outcome_.exponential * (std::exp(logit - at_.largest) - std::exp(-logit - at_.largest));
    if (row_.weighted()) g -= outcome_.weight * weight_of_pair(j);
    if (j == label_) g = outcome_.label;
    return g - x * projection_;
  }

 private:
  __device__ A weight_of_pair(int j) const {
    return row_.weight[row_.begin + j] - row_.weight[row_.d + row_.begin + j];
  }

  LossRow<A> row_;
  bool positive_;  // whether the label's vertex is +e_c
  int label_;      // its coordinate relative to the sweeps' element 0; out of their range in other chunks
  A z_label_;
  OrthoplexRow<A> at_;
  A projection_;
  OrthoplexOutcome<A> outcome_;
};

}  // namespace simplexfix::cuda
