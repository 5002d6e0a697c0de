// Teams: the threads that share a row, a warp or a whole block, and their collective operations.
//
// Sums run in one order, which the row's length alone determines. A lane takes the same elements whatever the row's
// address (l, l + kThreads, l + 2 kThreads, ..., or whole vectors of them). Then the lanes merge in a butterfly, and
// the warps from first to last. So a row's result depends neither on its place in the batch nor on its stride.
#pragma once
#include "device.cuh"

namespace simplexfix::cuda {

template <int kThreads>
struct Team {
  static constexpr int kBlock = kThreads == 32 ? 256 : kThreads;  // threads of a block
  static constexpr int kTeams = kBlock / kThreads;                // rows that a block processes at a time
  static constexpr int kWarps = kThreads / 32;

  __device__ static int lane() { return int(threadIdx.x) % kThreads; }
  __device__ static int index() { return int(threadIdx.x) / kThreads; }  // index of the team in its block
  __device__ static int64_t first_row() { return int64_t(blockIdx.x) * kTeams + index(); }
  __device__ static int64_t row_step() { return int64_t(gridDim.x) * kTeams; }
};

__device__ __forceinline__ float combine(float a, float b) { return a + b; }
__device__ __forceinline__ double combine(double a, double b) { return a + b; }
__device__ __forceinline__ float from_lane_xor(float v, int mask) { return __shfl_xor_sync(kFullWarp, v, mask); }
__device__ __forceinline__ double from_lane_xor(double v, int mask) { return __shfl_xor_sync(kFullWarp, v, mask); }

// Merges the values of a warp's lanes; every lane gets the result. S needs combine() and from_lane_xor(). combine()
// must be commutative, or the lanes of the butterfly would differ.
template <typename S>
__device__ __forceinline__ S reduce_warp(S value) {
  SIMPLEXFIX_UNROLL for (int mask = 16; mask > 0; mask /= 2) value = combine(value, from_lane_xor(value, mask));
  return value;
}

// Merges the values of a team's lanes; every lane gets the result. s_partials has one element per warp of a block. No
// thread may still read it from an earlier call.
template <int kThreads, typename S>
__device__ __forceinline__ S reduce_team(S value, S* s_partials) {
  value = reduce_warp(value);
  if constexpr (kThreads > 32) {
    if (threadIdx.x % 32 == 0) s_partials[threadIdx.x / 32] = value;
    sync_team<kThreads>();  // every warp has written its value before any thread reads them all
    value = s_partials[0];
    _Pragma("unroll 4") for (int w = 1; w < Team<kThreads>::kWarps; ++w) value = combine(value, s_partials[w]);
  }
  return value;
}

// Calls f(j, in[j]) for j < d, with loads of 16 bytes if `in` is at a 16-byte boundary. Otherwise a lane loads the same
// elements one by one, so that sums do not depend on the alignment; only the first of these loads misses L1.
template <int kThreads, typename T, typename F>
__device__ __forceinline__ void sweep_vectors(const T* in, int d, F f) {
  constexpr int n = Vector<T>::kSize;
  const int lane = Team<kThreads>::lane(), whole = d / n * n;
  const bool aligned = misalignment(in) == 0;
  for (int j = lane * n; j < whole; j += kThreads * n) {
    Vector<T> v;
    if (aligned) {
      v = *reinterpret_cast<const Vector<T>*>(in + j);
    } else {
      SIMPLEXFIX_UNROLL for (int i = 0; i < n; ++i) v.v[i] = in[j + i];
    }
    SIMPLEXFIX_UNROLL for (int i = 0; i < n; ++i) f(j + i, v.v[i]);
  }
  if (whole + lane < d) f(whole + lane, in[whole + lane]);
}

// out[j] = f(j, in[j]) for j < d. If in and out have the same misalignment, it moves 16 bytes at a time, with up to
// Vector::kSize - 1 single elements before and after. Otherwise it moves single elements. `alike` selects the
// first case, and `start` is the misalignment. The caller computes both from global addresses only, so that the
// compiler can still infer which pointers are into shared memory.
template <int kThreads, typename T, typename Index, typename F>
__device__ __forceinline__ void map_row(const T* in, T* out, Index d, int start, bool alike, F f) {
  constexpr Index n = Vector<T>::kSize;
  const Index lane = Team<kThreads>::lane();
  if (!alike) {
    _Pragma("unroll 1") for (Index j = lane; j < d; j += kThreads) out[j] = f(j, in[j]);  // rare: save registers
    return;
  }
  const Index to_boundary = (n - start) % n;
  const Index head = to_boundary < d ? to_boundary : d;
  const Index body = (d - head) / n * n;
  const Index single = lane < head ? lane : lane + body;  // fewer than 2 n <= 32 such elements
  if (single < d) out[single] = f(single, in[single]);
  for (Index j = head + lane * n; j < head + body; j += kThreads * n) {
    Vector<T> v = *reinterpret_cast<const Vector<T>*>(in + j);
    SIMPLEXFIX_UNROLL for (int i = 0; i < n; ++i) v.v[i] = f(j + i, v.v[i]);
    *reinterpret_cast<Vector<T>*>(out + j) = v;
  }
}

}  // namespace simplexfix::cuda
