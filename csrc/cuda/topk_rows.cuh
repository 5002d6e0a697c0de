// Prepares rows for the search: their norms, their bfloat16 codes, and bounds for the error of the codes.
//
// Work:    eight lanes per row, 32 rows per block of 256 threads.
// Memory:  a row is read twice (the second time through L1 or L2); 2 bytes per number are written, 6 for queries.
// Numerics: core/cosine_score.h, with the same bits as on the CPU.
// Determinism: a row has the same bits at any place in the batch.
// Budget:  64 registers, so 1024 threads per SM; no shared memory, no local memory.
#pragma once
#include "../core/cosine_score.h"
#include "team.cuh"

namespace simplexfix::cuda {

constexpr int kPartials = 8;  // partial sums of a row; also the lanes that share it
constexpr int kRowThreads = 256;

// Returns the sum over a row from its partial sums in lanes 8 i to 8 i + 7, to each of these lanes.
__device__ __forceinline__ double total_of_partials(double v) {
  SIMPLEXFIX_UNROLL for (int mask = kPartials / 2; mask > 0; mask /= 2) v += from_lane_xor(v, mask);
  return v;
}

struct RowsParams {
  const float* rows;  // [n, d], stride elements apart
  int64_t stride, n, d;
  int64_t pitch;                        // row length of the codes, a multiple of 8
  int64_t depth;                        // number of products per dot product of codes
  __nv_bfloat16* code;                  // [n, pitch], zeros from d on; or nullptr
  double* norm;                         // [n], nan if a number of the row is nan or inf
  float* error_bound;                   // [n]
  float* unit;                          // [n, d] normalised: queries only
  unsigned long long* non_finite_rows;  // number of gallery rows with nan or inf; the launch for queries sets it to 0
};

template <bool kQueries>
__global__ void __launch_bounds__(kRowThreads, 4) prepare_rows(const RowsParams p) {
  constexpr int kRows = 32 / kPartials;  // rows per warp
  const int lane = int(threadIdx.x) % kPartials;
  const int64_t warp = (int64_t(blockIdx.x) * kRowThreads + int(threadIdx.x)) / 32;
  const int64_t step = int64_t(gridDim.x) * kRowThreads / kPartials;
  if (kQueries && blockIdx.x == 0 && threadIdx.x == 0) *p.non_finite_rows = 0;  // the gallery's launch follows this one
  const int64_t columns = p.code ? p.pitch : kQueries ? p.d : 0;
  for (int64_t first = warp * kRows; first < p.n; first += step) {  // whole warps, for the shuffles
    const int64_t own = first + int(threadIdx.x) % 32 / kPartials;
    const bool writes = own < p.n;
    const int64_t row = writes ? own : p.n - 1;
    const float* x = p.rows + row * p.stride;
    double squares = 0;
    for (int64_t j = lane; j < p.d; j += kPartials) squares += double(x[j]) * double(x[j]);
    squares = total_of_partials(squares);
    const bool finite = squares < double(INFINITY);  // squares of floats do not overflow a double
    const double norm = finite ? std::sqrt(squares) : double(NAN);
    double residual = 0;
    for (int64_t j = lane; j < columns; j += kPartials) {
      const float y = j < p.d ? unit_number(x[j], norm) : 0.f;
      const auto code = __nv_bfloat16(y);
      const double difference = double(y) - double(float(code));
      residual += difference * difference;
      if (!writes) continue;
      if (p.code) p.code[row * p.pitch + j] = code;
      if constexpr (kQueries)
        if (j < p.d) p.unit[row * p.d + j] = y;
    }
    residual = std::sqrt(total_of_partials(residual));
    if (!writes || lane != 0) continue;
    p.norm[row] = norm;
    p.error_bound[row] = kQueries ? query_error_bound(residual, p.depth) : gallery_error_bound(residual);
    if constexpr (!kQueries)
      if (!finite) atomicAdd(p.non_finite_rows, 1ull);
  }
}

}  // namespace simplexfix::cuda
