// The kernels of the old/new contrast except for its matrix products, which are torch's. They compute norms of
// features, turn a block of similarities into losses and derivatives in place, and take the gradient through the
// normalisation.
//
// Work:    contrast_rows: a block of 256 threads per row. The others: a team per row, a warp (8 rows per block) for
//          d <= 256, else a block of 256.
// Memory:  contrast_rows reads and writes the block of similarities three times; without derivatives it reads it twice
//          and writes it once. The block stays in L2 if it fits: csrc/ops/old_new_contrast.cpp makes it 16 MiB. Classes
//          and scales add 12 bytes per candidate and row (16 with derivatives), from L2 too. project_rows reads z and
//          grad_unit twice, the second time from L1 or L2, and writes the result once.
// Numerics: float (double for double); one rounding at the end.
// Determinism: a row has the same bits at any place in the batch and on any grid (team.cuh).
// Budget:  64 registers, no local memory.
#pragma once
#include "../core/contrast.h"
#include "team.cuh"

namespace simplexfix::cuda {

constexpr int kContrastThreads = 256;

template <typename A>
struct ContrastParams {
  A* similarity;  // [rows, candidates]
  const int64_t *anchor_class, *candidate_class;
  const A *anchor_scale, *candidate_scale;
  const A* upstream;  // nullptr if no derivatives are requested
  A* loss;
  int64_t rows, candidates, first_positive;
  A mu;
  Negatives negatives;
};

template <typename A>
struct ContrastSums {
  int64_t same;  // number of candidates of the anchor's class
  A largest;     // largest score of the other candidates
  A own;         // the own candidate's score, in the one thread that has it
};
template <typename A>
__device__ __forceinline__ ContrastSums<A> combine(const ContrastSums<A>& a, const ContrastSums<A>& b) {
  return {a.same + b.same, a.largest < b.largest ? b.largest : a.largest, a.own + b.own};
}
template <typename A>
__device__ __forceinline__ ContrastSums<A> from_lane_xor(const ContrastSums<A>& v, int mask) {
  return {int64_t(__shfl_xor_sync(kFullWarp, (long long)v.same, mask)), from_lane_xor(v.largest, mask),
          from_lane_xor(v.own, mask)};
}

template <typename A>
__global__ void __launch_bounds__(kContrastThreads) contrast_rows(const ContrastParams<A> p) {
  using Rows = Team<kContrastThreads>;
  const A lowest = -A(INFINITY);
  SIMPLEXFIX_SHARED(s_sums, ContrastSums<A>[Rows::kWarps]);
  SIMPLEXFIX_SHARED(s_others, A[Rows::kWarps]);  // for both, a barrier separates the last read from the next write
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    A* s = p.similarity + row * p.candidates;
    const int64_t anchor = p.anchor_class[row], own_at = p.first_positive + row;
    const A factor = p.mu * p.anchor_scale[row];
    // A thread reads and writes the same columns in all three sweeps.
    ContrastSums<A> sums{0, lowest, A(0)};
    for (int64_t j = Rows::lane(); j < p.candidates; j += kContrastThreads) {
      const A score = s[j] * factor * p.candidate_scale[j];
      const bool differs = p.candidate_class[j] != anchor;
      if (j == own_at) sums.own = score;
      if (!differs) ++sums.same;
      if (differs && !(score <= sums.largest)) sums.largest = score;
      s[j] = differs ? score : lowest;
    }
    sums = reduce_team<kContrastThreads>(sums, s_sums);
    const A top = contrast_top(p.negatives, sums.largest, sums.own);
    A others = A(0);
    for (int64_t j = Rows::lane(); j < p.candidates; j += kContrastThreads) {
      const A e = s[j] == lowest ? A(0) : std::exp(s[j] - top);
      if (p.upstream) s[j] = e;
      others += e;
    }
    others = reduce_team<kContrastThreads>(others, s_others);
    const auto outcome = contrast_outcome(p.negatives, top, sums.own, others, A(sums.same), sums.same == p.candidates);
    if (Rows::lane() == 0) p.loss[row] = outcome.loss;
    if (!p.upstream) continue;
    const A slope = p.upstream[row] * factor, grad_scale = slope / outcome.total, own = -outcome.missing * slope;
    for (int64_t j = Rows::lane(); j < p.candidates; j += kContrastThreads)
      s[j] = (j == own_at ? own : s[j] * grad_scale) * p.candidate_scale[j];
  }
}

template <typename T>
struct NormParams {
  using A = accumulate_t<T>;
  const T* z;
  A* out;  // 1 / |z|, or 0 for a zero row
  int64_t z_stride, rows, d;
};

template <typename T, int kThreads>
__global__ void __launch_bounds__(Team<kThreads>::kBlock) inverse_norms(const NormParams<T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  SIMPLEXFIX_SHARED(s_partials, A[Rows::kWarps]);
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    const T* z = p.z + row * p.z_stride;
    A squares = A(0);
    for (int64_t j = Rows::lane(); j < p.d; j += kThreads) squares += A(z[j]) * A(z[j]);
    squares = reduce_team<kThreads>(squares, s_partials);
    if (Rows::lane() == 0) p.out[row] = squares == A(0) ? A(0) : A(1) / std::sqrt(squares);
    sync_team<kThreads>();  // the next row's values overwrite s_partials
  }
}

template <typename T>
struct ProjectParams {
  using A = accumulate_t<T>;
  const T* z;
  const A* grad_unit;     // [rows, d], already with the factor 1 / |z|
  const A* inverse_norm;  // [rows]
  T* out;                 // [rows, d]; may be grad_unit
  int64_t z_stride, rows, d;
};

// out = grad_unit - z (z . grad_unit) / |z|^2
template <typename T, int kThreads>
__global__ void __launch_bounds__(Team<kThreads>::kBlock) project_rows(const ProjectParams<T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  SIMPLEXFIX_SHARED(s_partials, A[Rows::kWarps]);
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    const T* z = p.z + row * p.z_stride;
    const A* grad_unit = p.grad_unit + row * p.d;
    A projection = A(0);
    for (int64_t j = Rows::lane(); j < p.d; j += kThreads) projection += A(z[j]) * grad_unit[j];
    projection = reduce_team<kThreads>(projection, s_partials) * p.inverse_norm[row] * p.inverse_norm[row];
    for (int64_t j = Rows::lane(); j < p.d; j += kThreads)
      p.out[row * p.d + j] = T(grad_unit[j] - A(z[j]) * projection);
    sync_team<kThreads>();  // the next row's values overwrite s_partials
  }
}

}  // namespace simplexfix::cuda
