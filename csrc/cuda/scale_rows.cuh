// out = in * factor on the GPU, with one factor for all rows or one per row. A factor of 1 returns the bits of `in`.
// With a divisor the factor is first divided by it (core/cross_entropy.h).
//
// Work:    a block of 128 threads processes one piece at a time: a row, or kFlatPiece elements if there is one factor.
// Memory:  in is read once and out written once, 16 bytes at a time except at the ragged ends of a piece.
// Numerics: one product in float (double for double), one rounding.
// Determinism: elementwise.
// Budget:  40 registers, no shared memory, no local memory.
#pragma once
#include "../core/cross_entropy.h"
#include "team.cuh"

namespace simplexfix::cuda {

constexpr int kScaleThreads = 128;
constexpr int64_t kFlatPiece = 4096;

template <typename T>
struct ScaleParams {
  const T* in;
  const accumulate_t<T>* factor;
  const accumulate_t<T>* divisor;  // or nullptr
  T* out;
  int64_t factor_stride, pieces, piece, total;  // the last piece ends at `total` elements
};

template <typename T>
__global__ void __launch_bounds__(kScaleThreads) scale_rows(const ScaleParams<T> p) {
  using A = accumulate_t<T>;
  for (int64_t k = blockIdx.x; k < p.pieces; k += gridDim.x) {
    A factor = p.factor[k * p.factor_stride];
    if (p.divisor) factor = divide_upstream(factor, *p.divisor);
    const int64_t begin = k * p.piece, left = p.total - begin;
    const T* in = p.in + begin;
    T* out = p.out + begin;
    map_row<kScaleThreads>(in, out, left < p.piece ? left : p.piece, misalignment(out),
                           misalignment(in) == misalignment(out), [=](int64_t, T x) { return T(A(x) * factor); });
  }
}

}  // namespace simplexfix::cuda
