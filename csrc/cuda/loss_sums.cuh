// The sums that run before and after a loss's kernels for the rows: the divisor of a mean, the sum of the class
// weights, the loss of the batch.
//
// The stream orders them with the rows' kernels, and no number is copied to the host. So a CUDA graph can hold all of
// them, and targets and weights may change between its replays. They use no atomic addition.
#pragma once
#include "team.cuh"

namespace simplexfix::cuda {

// Sums for the rows' kernels, in double and in a fixed order. Block 0 writes sums[0], the sum of the weights of all
// targets that count (1 each without weights), and copies it to divisor, if given. A target out of range adds nothing:
// its row makes the loss nan. Block 1, if launched, writes sums[1], the sum of the class weights.
//
// Memory:  8 bytes per row and, with weights, a gather. One block does it: at 10^6 rows this takes less than a tenth of
//          the time of the rows themselves at d = 100 (estimated, not measured).
constexpr int kReduceThreads = 512;

template <typename A>
__global__ void __launch_bounds__(kReduceThreads)
    target_sums(const int64_t* target, const A* weight, int64_t rows, int64_t slots, int64_t ignore_index, double* sums,
                A* divisor) {
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
  if (threadIdx.x == 0 && blockIdx.x == 0 && divisor) *divisor = A(sum);
}

// loss = sum of row_loss, in double and in a fixed order, divided by sums[0] if sums is given. The mean over no rows is
// 0 / 0 = nan, as in torch. One block; memory: 4 bytes per row (double: 8).
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
