// The sums around a loss: what a mean divides by, the sum of the class weights, the loss of the batch.
//
// One stream orders them and the rows' kernels; no number travels to the host between them, so a CUDA graph can
// hold all, targets and weights may change between its replays, and no atomic addition takes part.
#pragma once
#include "team.cuh"

namespace simplexfix::cuda {

// Sums for the rows' kernels, in double and in one order.  Block 0: sums[0], of the weights of all
// targets that count (one each without weights; none for a target out of range, whose row turns the
// loss into nan by itself).  Block 1, where launched: sums[1], of the class weights.
// Memory:  8 bytes a row and, with weights, a gather.  One block: at 10^6 rows still under a tenth of
//          the time of the rows themselves at d = 100 (estimated, not measured).
constexpr int kReduceThreads = 512;

template <typename A>
__global__ void __launch_bounds__(kReduceThreads) target_sums(const int64_t* target, const A* weight, int64_t rows,
                                                              int64_t slots, int64_t ignore_index, double* sums) {
  SIMPLEXFIX_SHARED(s_partials, double[kReduceThreads / 32]);
  double sum = 0;
  if (blockIdx.x == 0) {
    for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) {
      const int64_t label = target[row];
      if (label != ignore_index && label >= 0 && label < slots) sum += weight ? double(weight[label]) : 1.0;
    }
  } else {
    for (int64_t c = threadIdx.x; c < slots; c += kReduceThreads) sum += double(weight[c]);
  }
  sum = reduce_team<kReduceThreads>(sum, s_partials);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// loss = sum of row_loss, in double and in one order, divided by sums[0] where that is given: a mean
// over nothing is 0 / 0, nan, as in torch.  One block; memory: 4 bytes a row (double: 8).
template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    reduce_loss(const A* row_loss, int64_t rows, const double* sums, A* loss) {
  SIMPLEXFIX_SHARED(s_partials, double[kReduceThreads / 32]);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < rows; row += kReduceThreads) sum += double(row_loss[row]);
  sum = reduce_team<kReduceThreads>(sum, s_partials);
  if (threadIdx.x == 0) *loss = A(sums ? sum / sums[0] : sum);
}

}  // namespace simplexfix::cuda
