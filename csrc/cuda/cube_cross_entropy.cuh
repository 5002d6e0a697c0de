// Cube cross-entropy of a row, for the kernels of cross_entropy.cuh. core/cube.h has the math.
//
// With v_j = s_j z_j, x_j = -2 f v_j and e = exp(-|x_j|): log(1 + exp(x_j)) = max(x_j, 0) + log(1 + e), and
// sigmoid(x_j) is 1 / (1 + e) or e / (1 + e). A thread takes one logarithm per row, of the product of its (1 + e).
#pragma once
#include "../core/cube.h"
#include "cross_entropy.cuh"

namespace simplexfix::cuda {

template <typename A>
struct CubeSums {
  A squares;  // sum_j z_j^2
  A dot;      // sum_j v_j
  A linear;   // sum_j max(-v_j, 0)
  A largest;  // max -v_j
};
template <typename A>
__device__ __forceinline__ CubeSums<A> combine(const CubeSums<A>& a, const CubeSums<A>& b) {
  return {a.squares + b.squares, a.dot + b.dot, a.linear + b.linear, a.largest > b.largest ? a.largest : b.largest};
}
template <typename A>
__device__ __forceinline__ CubeSums<A> from_lane_xor(const CubeSums<A>& v, int mask) {
  return {from_lane_xor(v.squares, mask), from_lane_xor(v.dot, mask), from_lane_xor(v.linear, mask),
          from_lane_xor(v.largest, mask)};
}

template <typename A>
struct CubeTerms {
  A logs;       // sum_j log(1 + e)
  A dot;        // sum_j v_j sigmoid(x_j)
  A flips;      // with a margin, for cube_gap_of_flips: sum_j exp(x_j - largest x)
  A flips_dot;  // ... times v_j
};
template <typename A>
__device__ __forceinline__ CubeTerms<A> combine(const CubeTerms<A>& a, const CubeTerms<A>& b) {
  return {a.logs + b.logs, a.dot + b.dot, a.flips + b.flips, a.flips_dot + b.flips_dot};
}
template <typename A>
__device__ __forceinline__ CubeTerms<A> from_lane_xor(const CubeTerms<A>& v, int mask) {
  return {from_lane_xor(v.logs, mask), from_lane_xor(v.dot, mask), from_lane_xor(v.flips, mask),
          from_lane_xor(v.flips_dot, mask)};
}

template <typename A>
struct CubeConstants {
  A inverse_sqrt_d, inverse_slots;  // inverse_slots = 2^-d
  const int64_t* codes;             // [slots, words], or nullptr if a target is its own code
  int64_t words;
};

template <typename A>
class CubeLoss {
 public:
  using Constants = CubeConstants<A>;
  using Sums = CubeSums<A>;
  using Terms = CubeTerms<A>;

  template <typename T>
  __device__ CubeLoss(const LossRow<A>& row, const Constants& cube, const T*)
      : row_(row),
        cube_(cube),
        code_((cube.codes ? cube.codes + row.slot() * cube.words : row.target) + row.begin / 64),
        product_(0) {}

  __device__ static Sums no_sums() { return {A(0), A(0), A(0), A(-INFINITY)}; }

  __device__ void accumulate(Sums* sums, int j, A x) const {
    const A v = positive(j) ? x : -x;
    sums->squares += x * x;
    sums->dot += v;
    if (v < A(0)) sums->linear -= v;
    if (-v > sums->largest) sums->largest = -v;
  }

  __device__ void set_sums(const Sums& sums) {
    at_ = cube_row(row_.options, sums.squares, cube_.inverse_sqrt_d, sums.dot);
    slope_ = A(2) * at_.factor;
    largest_ = sums.largest;
    tiny_ = false;
  }

  __device__ void accumulate(Terms* terms, int j, A x) {
    const A v = positive(j) ? x : -x, e = std::exp(-std::fabs(v * slope_));
    product_ += e + product_ * e;  // product of (1 + e), minus 1: small losses keep their bits
    if (product_ > kLarge) {       // far from overflow, and far above 1
      product_ = product_ * (A(1) / kLarge) - A(1);
      terms->logs += kLogLarge;
    }
    terms->dot += v * sigmoid(v, e);
    if (row_.options.margin != Margin::kNone) {
      const A flip = flip_of(v);
      terms->flips += flip;
      terms->flips_dot += flip * v;
    }
  }
  __device__ void finalize(Terms* terms) { terms->logs += std::log1p(product_); }

  __device__ A compute_loss(const Sums& sums, const Terms& terms) {
    const int64_t slot = row_.slot();
    const A none = A(0) * at_.label.value;  // nan if the logits are infinite, as a softmax of them would be
    CubeGap<A> gap{slope_ * sums.linear + terms.logs + none, A(1) + none};
    if (row_.options.margin != Margin::kNone) {
      tiny_ = gap.gap < A(kLeastCubeGap<A>);
      gap = tiny_ ? cube_gap_of_flips(slope_ * largest_, terms.flips, at_.label.margin)
                  : cube_gap(gap.gap, at_.label.margin);
    }
    const A weight_label = row_.weight ? row_.weight[slot] : A(1);
    outcome_ = cube_outcome(row_.options_with_weights(), at_, gap, cube_.inverse_slots, weight_label, row_.upstream());
    projection_ = A(0);  // (z . g) / |z|^2, where g already has the factor 1 / |z|
    if (row_.options.normalize) {
      const A dot = outcome_.constant * sums.dot - outcome_.coefficient * (tiny_ ? terms.flips_dot : terms.dot);
      projection_ = dot * (at_.inverse_norm * at_.inverse_norm);
    }
    return outcome_.loss;
  }

  __device__ A gradient(int j, A x) const {
    const bool plus = positive(j);
    const A v = plus ? x : -x, probability = tiny_ ? flip_of(v) : sigmoid(v, std::exp(-std::fabs(v * slope_)));
    const A g = outcome_.constant - outcome_.coefficient * probability;
    return (plus ? g : -g) - x * projection_;
  }

 private:
  static constexpr A kLarge = A(0x1p60), kLogLarge = A(41.588830833596718565);  // 60 log(2)

  __device__ bool positive(int j) const { return (uint64_t(code_[j >> 6]) >> (j & 63)) & 1; }
  __device__ static A sigmoid(A v, A e) { return (v < A(0) ? A(1) : e) / (A(1) + e); }
  __device__ A flip_of(A v) const { return std::exp((-v - largest_) * slope_); }

  LossRow<A> row_;
  const Constants& cube_;
  const int64_t* code_;  // code of the label's vertex, from the sweeps' element 0 on
  A product_;            // product of this thread's (1 + e), minus 1
  CubeRow<A> at_;
  A slope_;    // x_j = -slope v_j
  A largest_;  // largest -v_j
  bool tiny_;  // whether flips replace the sigmoids
  A projection_;
  CubeOutcome<A> outcome_;
};

}  // namespace simplexfix::cuda
