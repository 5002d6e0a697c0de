// Simplex logits of rows on the GPU, l = scale * W z (or scale * W z / |z|), and their gradient, in closed form
// (core/simplex.h).
//
// Work:    a team computes one row at a time: a warp (8 rows per block) for d <= 256, else a block of 256. Sweep 1
//          accumulates sums, sweep 2 writes.
// Memory:  forward reads z, backward the logits' gradient (and z, with normalize), once from memory and a second time
//          through L1 or L2. The result is written once. Rows of z and of the logits differ in length by one, so they
//          are seldom aligned alike: most accesses are single elements, contiguous across a warp.
// Numerics: sums and products in float for 16-bit and float, double for double; one rounding at the end.
// Determinism: a row has the same bits at any place in the batch and on any grid (team.cuh).
// Budget:  64 registers, so at least 1024 threads per SM, in double too. No local memory.
#pragma once
#include "../core/simplex_cross_entropy.h"
#include "team.cuh"

namespace simplexfix::cuda {

template <typename T>
struct LogitsParams {
  using A = accumulate_t<T>;
  const T* z;
  const T* logits_gradient;  // backward only
  T* out;
  int64_t z_stride, rows, d;
  RoundedSimplex<A> simplex;
  A scale;
  bool normalize;
};

// Sums over a row z and over a gradient g of its first d logits.
template <typename A>
struct LogitsSums {
  A z, squares, g, dot;  // sum of z, z^2, g, z g
};
template <typename A>
__device__ __forceinline__ LogitsSums<A> combine(const LogitsSums<A>& a, const LogitsSums<A>& b) {
  return {a.z + b.z, a.squares + b.squares, a.g + b.g, a.dot + b.dot};
}
template <typename A>
__device__ __forceinline__ LogitsSums<A> from_lane_xor(const LogitsSums<A>& v, int mask) {
  return {from_lane_xor(v.z, mask), from_lane_xor(v.squares, mask), from_lane_xor(v.g, mask),
          from_lane_xor(v.dot, mask)};
}

template <typename A>
__device__ __forceinline__ A inverse_norm(A squares) {  // a zero row normalises to zero
  return squares > A(0) ? A(1) / std::sqrt(squares) : A(0);
}

template <typename T, int kThreads>
__global__ void __launch_bounds__(Team<kThreads>::kBlock) simplex_logits(const LogitsParams<T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  SIMPLEXFIX_SHARED(s_sums, LogitsSums<A>[Rows::kWarps]);
  const int lane = Rows::lane();
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    const T* z = p.z + row * p.z_stride;
    T* out = p.out + row * (p.d + 1);
    LogitsSums<A> sums{};
    for (int64_t j = lane; j < p.d; j += kThreads) {
      const A x = A(z[j]);
      sums.z += x;
      sums.squares += x * x;
    }
    sums = reduce_team<kThreads>(sums, s_sums);
    A factor = p.scale * p.simplex.inverse_r;
    if (p.normalize) factor *= inverse_norm(sums.squares);
    const A shift = factor * p.simplex.m * sums.z;
    map_row<kThreads>(z, out, p.d, misalignment(out), misalignment(z) == misalignment(out),
                      [=](int64_t, T x) { return T(A(x) * factor - shift); });
    if (lane == 0) out[p.d] = T(factor * p.simplex.last * sums.z);
    sync_team<kThreads>();  // the next row's values overwrite s_sums
  }
}

// dL/dz_j = factor * (g_j - m sum_{i<d} g_i + (a - m) g_d), minus its projection on z with normalize.
template <typename T, int kThreads>
__global__ void __launch_bounds__(Team<kThreads>::kBlock) simplex_logits_backward(const LogitsParams<T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  SIMPLEXFIX_SHARED(s_sums, LogitsSums<A>[Rows::kWarps]);
  const int lane = Rows::lane();
  const bool normalize = p.normalize;
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    const T* z = p.z + row * p.z_stride;
    const T* g = p.logits_gradient + row * (p.d + 1);
    T* out = p.out + row * p.d;
    LogitsSums<A> sums{};
    for (int64_t j = lane; j < p.d; j += kThreads) {
      const A y = A(g[j]);
      sums.g += y;
      if (normalize) {
        const A x = A(z[j]);
        sums.z += x;
        sums.squares += x * x;
        sums.dot += x * y;
      }
    }
    sums = reduce_team<kThreads>(sums, s_sums);
    const A inverse = normalize ? inverse_norm(sums.squares) : A(1);
    const A factor = p.scale * p.simplex.inverse_r * inverse;
    const A constant = factor * (p.simplex.last * A(g[p.d]) - p.simplex.m * sums.g);
    const A projection = (factor * sums.dot + constant * sums.z) * inverse * inverse;
    map_row<kThreads>(g, out, p.d, misalignment(out), misalignment(g) == misalignment(out), [=](int64_t j, T y) {
      const A plain = A(y) * factor + constant;
      return T(normalize ? plain - A(z[j]) * projection : plain);
    });
    sync_team<kThreads>();  // the next row's values overwrite s_sums
  }
}

}  // namespace simplexfix::cuda
