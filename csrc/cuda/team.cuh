// Teams: the threads that share a row, a warp or a whole block, and what they do together.
//
// Sums run in one order, fixed by the row's length alone: a lane takes the same elements whatever the row's
// address (l, l + kThreads, l + 2 kThreads, ..., or whole vectors of them), then the lanes merge in a butterfly
// and the warps from first to last.  So a row's result depends neither on its place in the batch nor on its stride.
#pragma once
#include "device.cuh"

namespace simplexfix::cuda {

template <int kThreads>
struct Team {
  static constexpr int kBlock = kThreads == 32 ? 256 : kThreads;  // threads of a block
  static constexpr int kTeams = kBlock / kThreads;                // rows that a block works on at a time
  static constexpr int kWarps = kThreads / 32;

  __device__ static int lane() { return int(threadIdx.x) % kThreads; }
  __device__ static int index() { return int(threadIdx.x) / kThreads; }  // of the team in its block
  __device__ static int64_t first_row() { return int64_t(blockIdx.x) * kTeams + index(); }
  __device__ static int64_t row_step() { return int64_t(gridDim.x) * kTeams; }
};

__device__ __forceinline__ float combine(float a, float b) { return a + b; }
__device__ __forceinline__ double combine(double a, double b) { return a + b; }
__device__ __forceinline__ float from_lane_xor(float v, int mask) { return __shfl_xor_sync(kFullWarp, v, mask); }
__device__ __forceinline__ double from_lane_xor(double v, int mask) { return __shfl_xor_sync(kFullWarp, v, mask); }

// The values of a warp's lanes merged, the same for every lane.  S needs combine() and from_lane_xor(); combine()
// must not mind the order of its two arguments, or the lanes of a butterfly would differ.
template <typename S>
__device__ __forceinline__ S reduce_warp(S value) {
  SIMPLEXFIX_UNROLL for (int mask = 16; mask > 0; mask /= 2) value = combine(value, from_lane_xor(value, mask));
  return value;
}

// The values of a team's lanes merged, the same for every lane.
// s_partials has a place for each warp of a block; nobody may still be reading it from an earlier call.
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

// f(j, in[j]) for j < d, 16 bytes at a time where `in` lies on a 16-byte boundary.  Elsewhere a lane takes the same
// elements one by one, so that sums come out alike wherever a row lies; its neighbours' lines are in L1 then.
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

// out[j] = f(j, in[j]) for j < d: 16 bytes at a time where in and out lie alike towards a 16-byte
// boundary, with up to Vector::kSize - 1 single elements before and after; one by one elsewhere.
// `alike` says whether they do, `start` is their misalignment then: the caller asks global addresses alone, so
// that pointers into shared memory stay shared for the compiler.
template <int kThreads, typename T, typename Index, typename F>
__device__ __forceinline__ void map_row(const T* in, T* out, Index d, int start, bool alike, F f) {
  constexpr Index n = Vector<T>::kSize;
  const Index lane = Team<kThreads>::lane();
  if (!alike) {
    _Pragma("unroll 1") for (Index j = lane; j < d; j += kThreads) out[j] = f(j, in[j]);  // seldom: no registers for it
    return;
  }
  const Index to_boundary = (n - start) % n;
  const Index head = to_boundary < d ? to_boundary : d;
  const Index body = (d - head) / n * n;
  const Index single = lane < head ? lane : lane + body;  // fewer than 2 n <= 32 are left to do so
  if (single < d) out[single] = f(single, in[single]);
  for (Index j = head + lane * n; j < head + body; j += kThreads * n) {
    Vector<T> v = *reinterpret_cast<const Vector<T>*>(in + j);
    SIMPLEXFIX_UNROLL for (int i = 0; i < n; ++i) v.v[i] = f(j + i, v.v[i]);
    *reinterpret_cast<Vector<T>*>(out + j) = v;
  }
}

}  // namespace simplexfix::cuda
