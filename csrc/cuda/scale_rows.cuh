// out = in * factor on the GPU, one factor for all or one for each row; exactly in where it is 1.
//
// Work:    a block of 128 does a piece at a time: a row, or kFlatPiece elements where one factor serves all.
// Memory:  in read once, out written once, 16 bytes at a time but for a piece's ragged ends.
// Numerics: one product in float (double for double), one rounding.
// Determinism: elementwise.
// Budget:  40 registers, no shared memory, no local memory.
#pragma once
#include "team.cuh"

namespace simplexfix::cuda {

constexpr int kScaleThreads = 128;
constexpr int64_t kFlatPiece = 4096;

template <typename T>
struct ScaleParams {
  const T* in;
  const accumulate_t<T>* factor;
  T* out;
  int64_t factor_stride, pieces, piece, total;  // the last piece ends with `total` elements
};

template <typename T>
__global__ void __launch_bounds__(kScaleThreads) scale_rows(const ScaleParams<T> p) {
  using A = accumulate_t<T>;
  for (int64_t k = blockIdx.x; k < p.pieces; k += gridDim.x) {
    const A factor = p.factor[k * p.factor_stride];
    const int64_t begin = k * p.piece, left = p.total - begin;
    const T* in = p.in + begin;
    T* out = p.out + begin;
    map_row<kScaleThreads>(in, out, left < p.piece ? left : p.piece, misalignment(out),
                           misalignment(in) == misalignment(out), [=](int64_t, T x) { return T(A(x) * factor); });
  }
}

}  // namespace simplexfix::cuda
