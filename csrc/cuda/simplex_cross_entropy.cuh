// Simplex cross-entropy of a row, for the kernels of cross_entropy.cuh. core/simplex_cross_entropy.h has the math.
#pragma once
#include "../core/simplex_cross_entropy.h"
#include "cross_entropy.cuh"

namespace simplexfix {  // the namespace of RowSums, so that reduce_warp finds these two
template <typename A>
__device__ __forceinline__ RowSums<A> combine(const RowSums<A>& a, const RowSums<A>& b) {
  return {a.sum + b.sum, a.squares + b.squares, a.largest > b.largest ? a.largest : b.largest, a.weighted + b.weighted};
}
template <typename A>
__device__ __forceinline__ RowSums<A> from_lane_xor(const RowSums<A>& v, int mask) {
  return {cuda::from_lane_xor(v.sum, mask), cuda::from_lane_xor(v.squares, mask), cuda::from_lane_xor(v.largest, mask),
          cuda::from_lane_xor(v.weighted, mask)};
}
}  // namespace simplexfix

namespace simplexfix::cuda {

// Sums over i < d other than the label, with e_i = exp(l_i - largest). sum_exp_others: sum of e_i. dot: sum of e_i z_i.
template <typename A>
struct SimplexTerms {
  A sum_exp_others, dot;
};
template <typename A>
__device__ __forceinline__ SimplexTerms<A> combine(const SimplexTerms<A>& a, const SimplexTerms<A>& b) {
  return {a.sum_exp_others + b.sum_exp_others, a.dot + b.dot};
}
template <typename A>
__device__ __forceinline__ SimplexTerms<A> from_lane_xor(const SimplexTerms<A>& v, int mask) {
  return {from_lane_xor(v.sum_exp_others, mask), from_lane_xor(v.dot, mask)};
}

template <typename A>
class SimplexLoss {
 public:
  using Constants = RoundedSimplex<A>;
  using Sums = RowSums<A>;
  using Terms = SimplexTerms<A>;

  template <typename T>
  __device__ SimplexLoss(const LossRow<A>& row, const Constants& simplex, const T* z)
      : row_(row),
        simplex_(simplex),
        label_(int(row.slot() - row.begin)),
        z_label_(row.slot() < row.d ? A(z[row.slot()]) : A(0)) {}

  __device__ static Sums no_sums() { return {A(0), A(0), A(-INFINITY), A(0)}; }

  __device__ void accumulate(Sums* sums, int j, A x) const {
    sums->sum += x;
    sums->squares += x * x;
    if (j != label_ && x > sums->largest) sums->largest = x;
    if (row_.weighted()) sums->weighted += x * row_.weight[row_.begin + j];
  }

  __device__ void set_sums(const Sums& sums) {
    logits_ = row_logits(simplex_, row_.options, sums, row_.d, row_.slot(), z_label_);
    shift_ = logits_.shift + logits_.largest;
  }

  __device__ void accumulate(Terms* terms, int j, A x) const {
    const A e = j == label_ ? A(0) : std::exp(x * logits_.factor - shift_);  // the label's may overflow
    terms->sum_exp_others += e;
    terms->dot += e * x;
  }
  __device__ void finalize(Terms*) const {}

  __device__ A compute_loss(const Sums& sums, const Terms& terms) {
    const int64_t slot = row_.slot();
    const A weight_label = row_.weight ? row_.weight[slot] : A(1);
    const A weight_last = row_.weight ? row_.weight[row_.d] : A(1);
    outcome_ = row_outcome(simplex_, row_.options_with_weights(), sums, logits_, row_.d, slot, terms.sum_exp_others,
                           row_.weighted(), weight_label, weight_last, row_.upstream());
    projection_ = A(0);  // (z . g) / |z|^2, where g already has the factor 1 / |z|
    if (row_.options.normalize) {
      A dot = outcome_.exponential * terms.dot + outcome_.constant * (sums.sum - z_label_);
      if (row_.weighted()) dot -= outcome_.weight * (sums.weighted - (slot < row_.d ? weight_label * z_label_ : A(0)));
      dot += outcome_.label * z_label_;
      projection_ = dot * (logits_.inverse_norm * logits_.inverse_norm);
    }
    return outcome_.loss.value();
  }

  __device__ A gradient(int j, A x) const {
    A g = outcome_.exponential * std::exp(x * logits_.factor - shift_) + outcome_.constant;
    if (row_.weighted()) g -= outcome_.weight * row_.weight[row_.begin + j];
    if (j == label_) g = outcome_.label;
    return g - x * projection_;
  }

 private:
  LossRow<A> row_;
  const Constants& simplex_;
  // The label's index relative to the sweeps' element 0. It is out of their range for the last slot, and in other
  // chunks.
  int label_;
  A z_label_;  // 0 for the last slot
  RowLogits<A> logits_;
  A shift_, projection_;
  RowOutcome<A> outcome_;
};

}  // namespace simplexfix::cuda
