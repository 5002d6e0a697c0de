// Cross-entropy against a polytope's fixed vertices on the GPU: the loss of every row and, where wanted, dL/dz.
//
// What a row's numbers mean is its polytope's: SimplexLoss, OrthoplexLoss and CubeLoss, in files of their own.  The
// kernels here move the row and meet at the barriers.  A row is swept three times:
//
//   1  loss.gather(&sums, j, z_j)       all lanes' Sums merged, loss.know(sums): the logits' scale and largest
//   2  loss.gather(&terms, j, z_j)      all lanes' Terms merged (after loss.close), loss.finish(sums, terms)
//   3  dL/dz_j = loss.gradient(j, z_j)
//
// The projection that normalize asks of the gradient needs z . g, which is linear in Sums and Terms: no sweep of its
// own.
//
// Which kernel, decided by the row's length alone (cross_entropy_launch.cuh), d numbers of n bytes:
//
//   d <= 256              cross_entropy, a warp to a row, 8 rows a block     d n + 30 bytes of shared memory a row
//   d n + 30 <= 16 KiB    cross_entropy, a block of 128 to a row             the same
//   d n + 30 <= 44 KiB    cross_entropy, a block of 512 to a row             the same
//   longer                cross_entropy_part, a block of 512 to a part       none but for reductions
//
// Memory:  cross_entropy reads z once and writes dL/dz once: 2 d n bytes a row; the row waits in shared memory for its
//          second and third sweep.  Parts are read three times and written once, by three launches for as many rows
//          as z has in kGroupBytes, so that where L2 holds more than that the second and third time come from there:
//          2 d n bytes of memory a row then, else 4 d n.  A part has at least kPartElements and a row at most
//          kMostParts: 16 rows of 2^20 numbers are 1024 blocks.  Everything moves 16 bytes at a time but for ragged
//          ends, and but for dL/dz (and for parts z) where its rows lie otherwise towards 16 bytes than z's.
// Numerics: sums, exponentials and the gradient before its rounding in float (double for double);
//          accurate exp and log.  A target out of range gives a nan loss and a nan gradient row: a
//          kernel can raise no error, and reads nothing out of bounds for it.
// Determinism: bitwise the same for a row wherever it lies, alone or among others, and whatever the grid (team.cuh);
//          parts merge in one order too.
// Budget:  64 registers, 1024 threads an SM; double: 128 and 512.  Shared memory leaves room for 640 threads at
//          least on sm_86 and sm_89, with their 100 KB of it.  No local memory.
#pragma once
#include "../core/cross_entropy.h"
#include "team.cuh"

namespace simplexfix::cuda {

// A row of up to these many bytes is kept by a block of 128, of 512.
constexpr int64_t kShortBytes = 16 << 10, kKeptBytes = 44 << 10;
constexpr int kPartThreads = 512;
constexpr int kPartElements = 8192, kMostParts = 64;

// What the kernels know of a row.  What finish() alone asks for is read there: no registers during the sweeps.
template <typename A>
struct LossRow {
  const CrossEntropyOptions<A>& options;  // weight_sum as without weights
  const double* sums;                     // CrossEntropyParams::sums
  bool mean;
  const A* weight;        // [slots], or nullptr
  int64_t d, begin;       // elements of the row; the one that the sweeps call 0
  const int64_t* target;  // in range

  // Whether the weights of all slots count: with label smoothing.
  __device__ bool weighted() const { return weight && options.smoothing > A(0); }
  __device__ int64_t slot() const { return *target; }
  __device__ A upstream() const { return mean ? A(1) / A(sums[0]) : A(1); }
  __device__ CrossEntropyOptions<A> options_with_weights() const {
    CrossEntropyOptions<A> with_weights = options;
    if (weighted()) with_weights.weight_sum = A(sums[1]);
    return with_weights;
  }
};

template <typename Loss, typename T>
struct CrossEntropyParams {
  using A = accumulate_t<T>;
  const T* z;
  const int64_t* target;
  const A* weight;     // or nullptr
  const double* sums;  // of loss_sums.cuh, read for a mean, and for class weights with smoothing
  A* row_loss;
  T* gradient;  // or nullptr
  int64_t z_stride, rows, d, slots, ignore_index;
  CrossEntropyOptions<A> options;
  bool mean;
  typename Loss::Constants constants;
};

// A row in parts, the last of them shorter: a multiple of all threads' vectors each, so that they lie alike.
template <typename Loss>
struct Parts {
  int size, count;
  typename Loss::Sums* sums;    // [rows, count] workspace
  typename Loss::Terms* terms;  // [rows, count] workspace
};

// The elements that a kept row takes: whole vectors, wherever in one its first element lies.
template <typename T>
SIMPLEXFIX_HD int64_t kept_slot(int64_t d) {
  constexpr int64_t n = Vector<T>::kSize;
  return (d + 2 * n - 2) / n * n;
}

// Blocks that an SM must have room for: the budget above.
template <typename T, int kBlock>
constexpr int kBlocks = sizeof(T) == 8 ? 512 / kBlock : 1024 / kBlock;

template <typename Loss, typename T>
__device__ __forceinline__ LossRow<accumulate_t<T>> row_of(const CrossEntropyParams<Loss, T>& p, int64_t row,
                                                           int64_t begin) {
  return {p.options, p.sums, p.mean, p.weight, p.d, begin, p.target + row};
}

// 1 where the row's target counts; 0 for an ignored row, nan for a target out of range: its loss and its gradient then.
template <typename Loss, typename T>
__device__ __forceinline__ float target_counts(const CrossEntropyParams<Loss, T>& p, int64_t target) {
  return target == p.ignore_index ? 0.f : target < 0 || target >= p.slots ? NAN : 1.f;
}

template <typename Loss, typename T, int kThreads>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, kBlocks<T, Team<kThreads>::kBlock>)
    cross_entropy(const CrossEntropyParams<Loss, T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  using Sums = typename Loss::Sums;
  using Terms = typename Loss::Terms;
  SIMPLEXFIX_SHARED(s_sums, Sums[Rows::kWarps]);
  SIMPLEXFIX_SHARED(s_terms, Terms[Rows::kWarps]);
  SIMPLEXFIX_DYNAMIC_SHARED(s_rows, T);

  const int d = int(p.d), lane = Rows::lane();
  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    T* g_gradient = p.gradient + (p.gradient ? row * p.d : 0);
    const float counts = target_counts(p, p.target[row]);
    if (counts != 1.f) {  // the same for the whole team: nobody waits at a barrier
      if (lane == 0) p.row_loss[row] = A(counts);
      if (p.gradient)
        for (int j = lane; j < d; j += kThreads) g_gradient[j] = T(A(counts));
      continue;
    }
    const T* g_z = p.z + row * p.z_stride;
    T* s_z = s_rows + Rows::index() * kept_slot<T>(d) + phase(g_z);  // alike, so that vectors fit both
    Loss loss(row_of(p, row, 0), p.constants, g_z);
    map_row<kThreads>(g_z, s_z, d, phase(g_z), true, [](int, T x) { return x; });
    sync_team<kThreads>();  // the sweeps below read what other threads have copied

    Sums sums = Loss::no_sums();
    _Pragma("unroll 2") for (int j = lane; j < d; j += kThreads) loss.gather(&sums, j, A(s_z[j]));
    sums = reduce_team<kThreads>(sums, s_sums);
    loss.know(sums);

    Terms terms{};
    _Pragma("unroll 2") for (int j = lane; j < d; j += kThreads) loss.gather(&terms, j, A(s_z[j]));
    loss.close(&terms);
    // A second buffer: slow warps may still read s_sums.  Its own readers of the row before are done,
    // for all threads have met in the reduction above since.
    terms = reduce_team<kThreads>(terms, s_terms);

    const A value = loss.finish(sums, terms);
    if (lane == 0) p.row_loss[row] = value;
    if (p.gradient)
      map_row<kThreads>(static_cast<const T*>(s_z), g_gradient, d, phase(g_gradient), phase(g_z) == phase(g_gradient),
                        [&](int j, T x) { return T(loss.gradient(j, A(x))); });
    sync_team<kThreads>();  // the next row overwrites this one in shared memory
  }
}

// Sums or terms of a row's parts merged, by each warp for itself.
template <typename S>
__device__ __forceinline__ S merge_parts(S value, const S* parts, int count) {
  for (int k = int(threadIdx.x) % 32; k < count; k += 32) value = combine(value, parts[k]);
  return reduce_warp(value);
}

// The three sweeps as three launches: one stream orders them, and no block waits for another.
enum class Sweep : int { kSums, kTerms, kGradient };

template <typename Loss, typename T, Sweep kSweep>
__global__ void __launch_bounds__(kPartThreads, kBlocks<T, kPartThreads>)
    cross_entropy_part(const CrossEntropyParams<Loss, T> p, const Parts<Loss> parts) {
  using A = accumulate_t<T>;
  using Sums = typename Loss::Sums;
  using Terms = typename Loss::Terms;
  SIMPLEXFIX_SHARED(s_sums, Sums[kPartThreads / 32]);
  SIMPLEXFIX_SHARED(s_terms, Terms[kPartThreads / 32]);

  const int lane = int(threadIdx.x);
  for (int64_t work = blockIdx.x; work < p.rows * parts.count; work += gridDim.x) {
    const int64_t row = work / parts.count;
    const int part = int(work - row * parts.count);
    const int64_t begin = int64_t(part) * parts.size, left = p.d - begin;
    const int length = int(left < parts.size ? left : parts.size);
    T* g_gradient = p.gradient + (p.gradient ? row * p.d + begin : 0);
    const float counts = target_counts(p, p.target[row]);
    if (counts != 1.f) {  // the same for the whole block
      if constexpr (kSweep == Sweep::kGradient) {
        if (part == 0 && lane == 0) p.row_loss[row] = A(counts);
        if (p.gradient)
          for (int j = lane; j < length; j += kPartThreads) g_gradient[j] = T(A(counts));
      }
      continue;
    }
    const T* g_z = p.z + row * p.z_stride;
    Loss loss(row_of(p, row, begin), p.constants, g_z);
    g_z += begin;
    Sums sums = Loss::no_sums();
    Terms terms{};
    if constexpr (kSweep == Sweep::kSums) {
      sweep_vectors<kPartThreads>(g_z, length, [&](int j, T x) { loss.gather(&sums, j, A(x)); });
      sums = reduce_team<kPartThreads>(sums, s_sums);
      if (lane == 0) parts.sums[work] = sums;
      sync_team<kPartThreads>();  // the next part's warps overwrite s_sums
      continue;
    }
    sums = merge_parts(sums, parts.sums + row * parts.count, parts.count);
    loss.know(sums);
    if constexpr (kSweep == Sweep::kTerms) {
      sweep_vectors<kPartThreads>(g_z, length, [&](int j, T x) { loss.gather(&terms, j, A(x)); });
      loss.close(&terms);
      terms = reduce_team<kPartThreads>(terms, s_terms);
      if (lane == 0) parts.terms[work] = terms;
      sync_team<kPartThreads>();  // the next part's warps overwrite s_terms
      continue;
    }
    terms = merge_parts(terms, parts.terms + row * parts.count, parts.count);
    const A value = loss.finish(sums, terms);
    if (part == 0 && lane == 0) p.row_loss[row] = value;
    if (p.gradient)
      map_row<kPartThreads>(g_z, g_gradient, length, phase(g_gradient), phase(g_z) == phase(g_gradient),
                            [&](int j, T x) { return T(loss.gradient(j, A(x))); });
  }
}

}  // namespace simplexfix::cuda
