// Simplex cross-entropy on the GPU: the loss of every row and, where wanted, dL/dz, by the row
// mathematics of core/simplex_cross_entropy.h; before it the sums that a mean needs, after it the mean.
//
//   target_sums            sums[0] = sum of the targets' class weights, sums[1] = sum of all class weights
//   simplex_cross_entropy  row losses and gradients, already divided by sums[0] for a mean
//   reduce_loss            the sum of the row losses, or that divided by sums[0]
//
// One stream orders the three; no number travels to the host between them, so a CUDA graph can hold
// them, targets and weights may change between its replays, and no atomic addition takes part.
#pragma once
#include "../core/simplex_cross_entropy.h"
#include "team.cuh"

namespace simplexfix {  // that of RowSums, where reduce_team looks for these two
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

// A row of up to this many bytes waits in shared memory for its second and third sweep.
constexpr int64_t kKeptBytes = 16384;

template <typename T>
struct CrossEntropyParams {
  using A = accumulate_t<T>;
  const T* z;
  const int64_t* target;
  const A* weight;     // or nullptr
  const double* sums;  // read for a mean, and for class weights with smoothing
  A* row_loss;
  T* gradient;  // or nullptr
  int64_t z_stride, rows, d, ignore_index;
  RoundedSimplex<A> simplex;
  CrossEntropyOptions<A> options;
  bool mean;
};

// The elements that a kept row takes: whole vectors, wherever in one its first element lies.
template <typename T>
SIMPLEXFIX_HD int64_t kept_slot(int64_t d) {
  constexpr int64_t n = Vector<T>::kSize;
  return (d + 2 * n - 2) / n * n;
}

// Over i < d other than the label: sum of e_i = exp(l_i - largest), and of e_i z_i.
template <typename A>
struct RowExponentials {
  A rest, along;
};
template <typename A>
__device__ __forceinline__ RowExponentials<A> combine(const RowExponentials<A>& a, const RowExponentials<A>& b) {
  return {a.rest + b.rest, a.along + b.along};
}
template <typename A>
__device__ __forceinline__ RowExponentials<A> from_lane_xor(const RowExponentials<A>& v, int mask) {
  return {from_lane_xor(v.rest, mask), from_lane_xor(v.along, mask)};
}

// Blocks that an SM must have room for.  ptxas finds the budget below by itself, except for double on
// sm_100, where it spills unless told; told for float, it spills on sm_80.
template <typename T, int kThreads>
constexpr int kDoubleBlocks = sizeof(T) == 8 ? 512 / Team<kThreads>::kBlock : 0;

// Loss and gradient of rows.
//
// Work:    a team of kThreads does a row at a time: a warp (8 rows a block) for d <= 256, a block of
//          128 for rows of up to 16 KB, a block of 512 for longer ones.  Sweep 1 gathers RowSums, sweep 2
//          RowExponentials, sweep 3 writes the gradient.  The projection that normalize asks of the
//          gradient needs z . g, which is linear in those sums: no sweep of its own.
// Memory:  z read once, dL/dz written once, 16 bytes at a time but for a row's ragged ends; a kept row
//          (kKept) stays in shared memory, d * sizeof(T) + 16 bytes a team; a longer one is read again
//          by each sweep, from L2, one element at a time.  dL/dz goes out one element at a time where
//          its rows lie otherwise towards 16 bytes than z's.
// Numerics: sums, exponentials and the gradient before its rounding in float (double for double);
//          accurate exp and log.  A target out of range gives a nan loss and a nan gradient row: a
//          kernel can raise no error, and reads nothing out of bounds for it.
// Determinism: bitwise the same for a row wherever it lies and whatever the grid (team.cuh).
// Budget:  64 registers, 1024 threads an SM; double: 128 and 512.  The longest kept rows leave room for 640
//          threads on sm_86 and sm_89, with their 100 KB of shared memory.  No local memory.
template <typename T, int kThreads, bool kKept>
__global__ void __launch_bounds__(Team<kThreads>::kBlock, kDoubleBlocks<T, kThreads>)
    simplex_cross_entropy(const CrossEntropyParams<T> p) {
  using A = accumulate_t<T>;
  using Rows = Team<kThreads>;
  using Index = std::conditional_t<kKept, int, int64_t>;
  SIMPLEXFIX_SHARED(s_sums, RowSums<A>[Rows::kWarps]);
  SIMPLEXFIX_SHARED(s_exponentials, RowExponentials<A>[Rows::kWarps]);
  SIMPLEXFIX_DYNAMIC_SHARED(s_rows, T);

  const Index d = Index(p.d), lane = Rows::lane();
  const bool weighted = p.weight && p.options.smoothing > A(0);
  CrossEntropyOptions<A> options = p.options;
  if (weighted) options.weight_sum = A(p.sums[1]);
  const A upstream = p.mean ? A(1) / A(p.sums[0]) : A(1);

  for (int64_t row = Rows::first_row(); row < p.rows; row += Rows::row_step()) {
    const int64_t target = p.target[row];
    const bool ignored = target == p.ignore_index;
    if (ignored || target < 0 || target > p.d) {  // the same for the whole team: nobody waits at a barrier
      const A value = ignored ? A(0) : A(NAN);
      if (lane == 0) p.row_loss[row] = value;
      if (p.gradient)
        for (Index j = lane; j < d; j += kThreads) p.gradient[row * p.d + j] = T(value);
      continue;
    }
    const Index label = Index(target);
    const T* g_z = p.z + row * p.z_stride;
    const T* z = g_z;
    if constexpr (kKept) {
      T* s_z = s_rows + Rows::index() * kept_slot<T>(d) + phase(g_z);  // alike, so that vectors fit both
      map_row<kThreads>(g_z, s_z, d, phase(g_z), true, [](Index, T x) { return x; });
      sync_team<kThreads>();  // the sweeps below read what other threads have copied
      z = s_z;
    }

    RowSums<A> sums{A(0), A(0), A(-INFINITY), A(0)};
    for (Index j = lane; j < d; j += kThreads) {
      const A x = A(z[j]);
      sums.sum += x;
      sums.squares += x * x;
      if (j != label && x > sums.largest) sums.largest = x;
      if (weighted) sums.weighted += x * p.weight[j];
    }
    sums = reduce_team<kThreads>(sums, s_sums);
    const A z_label = label < d ? A(z[label]) : A(0);
    const RowLogits<A> logits = row_logits(p.simplex, options, sums, d, label, z_label);

    const A factor = logits.factor, shift = logits.shift + logits.largest;
    RowExponentials<A> exponentials{A(0), A(0)};
    for (Index j = lane; j < d; j += kThreads) {
      const A x = A(z[j]);
      const A e = j == label ? A(0) : std::exp(x * factor - shift);  // the label's might overflow
      exponentials.rest += e;
      exponentials.along += e * x;
    }
    // A second buffer: slow warps may still read s_sums.  Its own readers of the row before are done,
    // for all threads have met in the reduction above since.
    exponentials = reduce_team<kThreads>(exponentials, s_exponentials);

    const A weight_label = p.weight ? p.weight[label] : A(1), weight_last = p.weight ? p.weight[d] : A(1);
    const RowOutcome<A> outcome = row_outcome(p.simplex, options, sums, logits, d, label, exponentials.rest, weighted,
                                              weight_label, weight_last, upstream);
    if (lane == 0) p.row_loss[row] = outcome.loss;
    if (p.gradient) {
      A projection = A(0);  // (z . g) / |z|^2, where g already carries the 1 / |z|
      if (options.normalize) {
        projection = outcome.exponential * exponentials.along + outcome.constant * (sums.sum - z_label);
        if (weighted) projection -= outcome.weight * (sums.weighted - (label < d ? weight_label * z_label : A(0)));
        projection += outcome.label * z_label;
        projection *= logits.inverse_norm * logits.inverse_norm;
      }
      T* g_out = p.gradient + row * p.d;
      map_row<kThreads>(z, g_out, d, phase(g_out), phase(g_z) == phase(g_out), [&](Index j, T value) {
        const A x = A(value);
        A g = outcome.exponential * std::exp(x * factor - shift) + outcome.constant;
        if (weighted) g -= outcome.weight * p.weight[j];
        if (j == label) g = outcome.label;
        return T(g - x * projection);
      });
    }
    if constexpr (kKept) sync_team<kThreads>();  // the next row overwrites this one in shared memory
  }
}

// Sums for simplex_cross_entropy, in double and in one order.  Block 0: sums[0], of the weights of all
// targets that count (one each without weights; none for a target out of range, whose row turns the
// loss into nan by itself).  Block 1, where launched: sums[1], of the class weights.
// Memory:  8 bytes a row and, with weights, a gather.  One block: at 10^6 rows still under a tenth of
//          the time of the rows themselves at d = 100 (estimated, not measured).
constexpr int kReduceThreads = 512;

template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    target_sums(const int64_t* target, const A* weight, int64_t rows, int64_t d, int64_t ignore_index, double* sums) {
  SIMPLEXFIX_SHARED(s_parts, double[kReduceThreads / 32]);
  double sum = 0;
  if (blockIdx.x == 0) {
    for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) {
      const int64_t label = target[row];
      if (label != ignore_index && label >= 0 && label <= d) sum += weight ? double(weight[label]) : 1.0;
    }
  } else {
    for (int64_t c = threadIdx.x; c <= d; c += kReduceThreads) sum += double(weight[c]);
  }
  sum = reduce_team<kReduceThreads>(sum, s_parts);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// loss = sum of row_loss, in double and in one order, divided by sums[0] where that is given: a mean
// over nothing is 0 / 0, nan, as in torch.  One block; memory: 4 bytes a row (double: 8).
template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_loss(const A* row_loss, int64_t rows, const double* sums, A* loss) {
  SIMPLEXFIX_SHARED(s_parts, double[kReduceThreads / 32]);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) sum += double(row_loss[row]);
  sum = reduce_team<kReduceThreads>(sum, s_parts);
  if (threadIdx.x == 0) *loss = A(sums ? sum / sums[0] : sum);
}

}  // namespace simplexfix::cuda
