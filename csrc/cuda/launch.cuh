// Host code that the .cu files share: launches, grids, dtypes, errors. Only this file calls the CUDA runtime. The
// emulator has its own launch_kernel (tests/native/emulator).
#pragma once
#include "kernels.h"
#include "team.cuh"

namespace simplexfix::cuda {

// The largest grid.x; kernels loop over further rows. The tests lower it.
#ifndef SIMPLEXFIX_MAX_BLOCKS
#define SIMPLEXFIX_MAX_BLOCKS 2147483647
#endif

#ifdef SIMPLEXFIX_EMULATED
using ::emulator::launch_kernel;
#else
template <typename... P>
const char* launch_kernel(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, void* stream,
                          P... params) {
  void* arguments[] = {&params...};
  cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)), dim3(unsigned(threads)), arguments,
                   size_t(shared_bytes), static_cast<cudaStream_t>(stream));
  const cudaError_t error = cudaGetLastError();  // clears the error too, so that torch does not report it later
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

inline int64_t blocks_for(int64_t work, int per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks < SIMPLEXFIX_MAX_BLOCKS ? blocks : SIMPLEXFIX_MAX_BLOCKS;
}

// Calls f(T{}) with the CUDA type of a dtype.
template <typename F>
const char* dispatch(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat: return f(float{});
    case DType::kDouble: return f(double{});
    case DType::kHalf: return f(__half{});
    case DType::kBFloat16: return f(__nv_bfloat16{});
  }
  return "unknown dtype";
}

template <typename A>
CrossEntropyOptions<A> round_options(const CrossEntropyOptions<double>& o) {
  return {o.normalize,    A(o.scale),      o.margin,           A(o.margin_size),
          A(o.smoothing), A(o.weight_sum), A(o.margin_cosine), A(o.margin_sine)};
}

}  // namespace simplexfix::cuda
