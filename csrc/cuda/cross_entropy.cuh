// Cross-entropy against a polytope's fixed vertices on the GPU: the loss of every row and, if requested, dL/dz.
//
// A class Loss defines the math of a polytope: SimplexLoss, OrthoplexLoss or CubeLoss, each in a file of its own. The
// kernels here move the rows and synchronize the threads. They sweep a row three times. Sweeps 1 and 2 are reductions
// over the types Loss::Sums and Loss::Terms; the functions combine() of these types merge the results of two lanes.
//
//   1  loss.accumulate(&sums, j, z_j)     merge all lanes; loss.set_sums(sums) computes scale and largest logit
//   2  loss.accumulate(&terms, j, z_j)    loss.finalize(&terms); merge all lanes; loss.compute_loss(sums, terms)
//   3  dL/dz_j = loss.gradient(j, z_j)
//
// With normalize the gradient is projected, which needs z . g. That is linear in Sums and Terms, so it takes no sweep
// of its own.
//
// Only the length of a row selects its kernel (cross_entropy_launch.cuh). Let b be the bytes of d elements, rounded up
// to staged_size(): at most 28 more.
//
//   d <= 256      cross_entropy, a warp per row, 8 rows per block   b bytes of shared memory per row
//   b <= 16 KiB   cross_entropy, a block of 128 per row             the same
//   b <= 44 KiB   cross_entropy, a block of 512 per row             the same
//   longer        cross_entropy_chunk, a block of 512 per chunk     shared memory for reductions only
//
// Memory:  cross_entropy reads z once and writes dL/dz once; the second and third sweep read the row from shared
//          memory. Chunks are read three times and written once, by three launches per group of rows. A group has
//          SIMPLEXFIX_GROUP_BYTES of z, so that the second and third read hit an L2 larger than that. Then a row costs
//          its bytes twice, else four times. A chunk has at least kChunkElements, a row at most kMostChunks chunks: 16
//          rows of 2^20 numbers are 1024 blocks. Threads move 16 bytes at a time, except at ragged ends, and except for
//          dL/dz (and z of chunks) where its rows are aligned differently from z's.
// Numerics: sums, exponentials and the gradient before its rounding are float (double for double), with accurate exp
//          and log. A target out of range gives a nan loss and a nan gradient row: a kernel cannot raise an error. No
//          kernel reads out of bounds for it.
// Determinism: a row has the same bits at any place in the batch, alone or among others, and on any grid (team.cuh).
//          Chunks too merge in one order.
// Budget:  64 registers and 1024 threads per SM; for double 128 and 512. Shared memory allows at least 640 threads on
//          sm_86 and sm_89, which have 100 KB. No local memory.
#pragma once
#include "../core/cross_entropy.h"
#include "team.cuh"

namespace simplexfix::cuda {

// Rows up to these sizes in bytes are staged by a block of 128 threads, or of 512.
constexpr int64_t kShortBytes = 16 << 10, kStagedBytes = 44 << 10;
constexpr int kChunkThreads = 512;
constexpr int kChunkElements = 8192, kMostChunks = 64;

// The inputs of one row. Values that only compute_loss() needs are loaded there, so they take no registers in the
// sweeps.
template <typename A>
struct LossRow {
  const CrossEntropyOptions<A>& options;  // weight_sum is that without weights
  const double* sums;                     // CrossEntropyParams::sums
  bool mean;
  const A* weight;        // [slots], or nullptr
  int64_t d, begin;       // elements of the row; index of the element that the sweeps call 0
  const int64_t* target;  // the row's target, which is in range

  // Whether the weights of all slots are used, which needs label smoothing.
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
  const double* sums;  // from loss_sums.cuh; read for a mean, and for class weights with smoothing
  A* row_loss;
  T* gradient;  // or nullptr
  int64_t z_stride, rows, d, slots, ignore_index;
  CrossEntropyOptions<A> options;
  bool mean;
  typename Loss::Constants constants;
};

// The chunks of a row; the last may be shorter. size is a multiple of all threads' vectors, so chunks are aligned
// alike.
template <typename Loss>
struct Chunks {
  int size, count;
  typename Loss::Sums* sums;    // [rows, count] workspace
  typename Loss::Terms* terms;  // [rows, count] workspace
};

// Elements of shared memory for a staged row: whole vectors, whatever the alignment of its first element.
template <typename T>
SIMPLEXFIX_HD int64_t staged_size(int64_t d) {
  constexpr int64_t n = Vector<T>::kSize;
  return (d + 2 * n - 2) / n * n;
}

// Blocks that must fit on an SM at once, by the budget above.
template <typename T, int kBlock>
constexpr int kBlocks = sizeof(T) == 8 ? 512 / kBlock : 1024 / kBlock;

template <typename Loss, typename T>
__device__ __forceinline__ LossRow<accumulate_t<T>> row_of(const CrossEntropyParams<Loss, T>& p, int64_t row,
                                                           int64_t begin) {
  return {p.options, p.sums, p.mean, p.weight, p.d, begin, p.target + row};
}

// Returns 1 if the row's target counts, 0 for an ignored row, nan for a target out of range. The last two values are
// also the row's loss and gradient.
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
    if (counts != 1.f) {  // the same for the whole team, so no thread skips a barrier
      if (lane == 0) p.row_loss[row] = A(counts);
      if (p.gradient)
        for (int j = lane; j < d; j += kThreads) g_gradient[j] = T(A(counts));
      continue;
    }
    const T* g_z = p.z + row * p.z_stride;
    T* s_z = s_rows + Rows::index() * staged_size<T>(d) + misalignment(g_z);  // aligned as g_z, for vectors
    Loss loss(row_of(p, row, 0), p.constants, g_z);
    map_row<kThreads>(g_z, s_z, d, misalignment(g_z), true, [](int, T x) { return x; });
    sync_team<kThreads>();  // the sweeps below read what other threads have copied

    Sums sums = Loss::no_sums();
    _Pragma("unroll 2") for (int j = lane; j < d; j += kThreads) loss.accumulate(&sums, j, A(s_z[j]));
    sums = reduce_team<kThreads>(sums, s_sums);
    loss.set_sums(sums);

    Terms terms{};
    _Pragma("unroll 2") for (int j = lane; j < d; j += kThreads) loss.accumulate(&terms, j, A(s_z[j]));
    loss.finalize(&terms);
    // s_terms is a second buffer: slow warps may still read s_sums. No thread still reads s_terms from the previous
    // row, because all threads have passed the barrier of the reduction above.
    terms = reduce_team<kThreads>(terms, s_terms);

    const A value = loss.compute_loss(sums, terms);
    if (lane == 0) p.row_loss[row] = value;
    if (p.gradient)
      map_row<kThreads>(static_cast<const T*>(s_z), g_gradient, d, misalignment(g_gradient),
                        misalignment(g_z) == misalignment(g_gradient),
                        [&](int j, T x) { return T(loss.gradient(j, A(x))); });
    sync_team<kThreads>();  // the next row overwrites this one in shared memory
  }
}

// Merges the sums or terms of a row's chunks. Each warp does so for itself.
template <typename S>
__device__ __forceinline__ S merge_chunks(S value, const S* chunks, int count) {
  for (int k = int(threadIdx.x) % 32; k < count; k += 32) value = combine(value, chunks[k]);
  return reduce_warp(value);
}

// Each sweep is a launch of its own: the stream orders them, and no block waits for another.
enum class Sweep : int { kSums, kTerms, kGradient };

template <typename Loss, typename T, Sweep kSweep>
__global__ void __launch_bounds__(kChunkThreads, kBlocks<T, kChunkThreads>)
    cross_entropy_chunk(const CrossEntropyParams<Loss, T> p, const Chunks<Loss> chunks) {
  using A = accumulate_t<T>;
  using Sums = typename Loss::Sums;
  using Terms = typename Loss::Terms;
  SIMPLEXFIX_SHARED(s_sums, Sums[kChunkThreads / 32]);
  SIMPLEXFIX_SHARED(s_terms, Terms[kChunkThreads / 32]);

  const int lane = int(threadIdx.x);
  for (int64_t work = blockIdx.x; work < p.rows * chunks.count; work += gridDim.x) {
    const int64_t row = work / chunks.count;
    const int chunk = int(work - row * chunks.count);
    const int64_t begin = int64_t(chunk) * chunks.size, left = p.d - begin;
    const int length = int(left < chunks.size ? left : chunks.size);
    T* g_gradient = p.gradient + (p.gradient ? row * p.d + begin : 0);
    const float counts = target_counts(p, p.target[row]);
    if (counts != 1.f) {  // the same for the whole block
      if constexpr (kSweep == Sweep::kGradient) {
        if (chunk == 0 && lane == 0) p.row_loss[row] = A(counts);
        if (p.gradient)
          for (int j = lane; j < length; j += kChunkThreads) g_gradient[j] = T(A(counts));
      }
      continue;
    }
    const T* g_z = p.z + row * p.z_stride;
    Loss loss(row_of(p, row, begin), p.constants, g_z);
    g_z += begin;
    Sums sums = Loss::no_sums();
    Terms terms{};
    if constexpr (kSweep == Sweep::kSums) {
      sweep_vectors<kChunkThreads>(g_z, length, [&](int j, T x) { loss.accumulate(&sums, j, A(x)); });
      sums = reduce_team<kChunkThreads>(sums, s_sums);
      if (lane == 0) chunks.sums[work] = sums;
      sync_team<kChunkThreads>();  // the next chunk's warps overwrite s_sums
      continue;
    }
    sums = merge_chunks(sums, chunks.sums + row * chunks.count, chunks.count);
    loss.set_sums(sums);
    if constexpr (kSweep == Sweep::kTerms) {
      sweep_vectors<kChunkThreads>(g_z, length, [&](int j, T x) { loss.accumulate(&terms, j, A(x)); });
      loss.finalize(&terms);
      terms = reduce_team<kChunkThreads>(terms, s_terms);
      if (lane == 0) chunks.terms[work] = terms;
      sync_team<kChunkThreads>();  // the next chunk's warps overwrite s_terms
      continue;
    }
    terms = merge_chunks(terms, chunks.terms + row * chunks.count, chunks.count);
    const A value = loss.compute_loss(sums, terms);
    if (chunk == 0 && lane == 0) p.row_loss[row] = value;
    if (p.gradient)
      map_row<kChunkThreads>(g_z, g_gradient, length, misalignment(g_gradient),
                             misalignment(g_z) == misalignment(g_gradient),
                             [&](int j, T x) { return T(loss.gradient(j, A(x))); });
  }
}

}  // namespace simplexfix::cuda
