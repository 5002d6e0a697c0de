// The old/new contrast on the GPU but for its matrix products, which are torch's: norms of the features, a block of
// rows of similarities turned into losses and derivatives in place, the gradient through the normalisation.
//
// Work:    contrast_rows a block of 256 threads a row; the others a team a row: a warp (8 rows a block) for d <= 256,
//          else a block of 256.
// Memory:  contrast_rows reads and writes the block of similarities three times (twice without derivatives), from L2
//          where it fits: csrc/ops/old_new_contrast.cpp makes it 16 MiB.  Beside it 12 bytes a candidate and row, from
//          L2 too.  project_rows reads z and grad_unit twice, the second time from L1 or L2, and writes the result
//          once.
// Numerics: float (double for double); one rounding at the end.
// Determinism: bitwise the same for a row wherever it lies and whatever the grid (team.cuh).
// Budget:  64 registers.  No local memory.
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
  const A* upstream;  // or nullptr where no derivatives are wanted
  A* loss;
  int64_t rows, candidates, first_positive;
  A mu;
  Negatives negatives;
};

template <typename A>
struct ContrastSums {
  int64_t same;  // scores that do not differ
  A largest;     // of those that do
  A own;         // that of the own candidate, of the one thread that has it
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
  SIMPLEXFIX_SHARED(s_others, A[Rows::kWarps]);  // each is written a barrier after the last reading of it
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    A* s = p.similarity + row * p.candidates;
    const int64_t anchor = p.anchor_class[row], own_at = p.first_positive + row;
    const A factor = p.mu * p.anchor_scale[row];
    // a thread keeps to its own columns in all three sweeps
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
  A* out;  // 1 / |z|, 0 of a zero row
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
  const A* grad_unit;     // [rows, d], already times 1 / |z|
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
