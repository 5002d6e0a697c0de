// The only file with shared-memory declarations (and, once a kernel needs it, inline PTX).  Two
// compilers see it: nvcc, and g++ with SIMPLEXFIX_EMULATED, under which tests/native runs the kernels.
#pragma once
#ifndef SIMPLEXFIX_EMULATED  // the emulator comes before this file and has its own names for CUDA's
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstdint>

#include "../core/types.h"

// SIMPLEXFIX_SHARED(name, type): an object of each block.  SIMPLEXFIX_DYNAMIC_SHARED(name, type):
// a pointer to the array whose bytes the launch asks for, aligned to 16.
// SIMPLEXFIX_CALLER, SIMPLEXFIX_AT: a parameter and its use, by which the emulator names the
// barrier where threads have parted; nothing on a GPU.
#ifdef SIMPLEXFIX_EMULATED
#define SIMPLEXFIX_SHARED(name, ...)                        \
  static const char name##_key __attribute__((unused)) = 0; \
  auto& name = ::emulator::static_shared<__VA_ARGS__>(&name##_key)
#define SIMPLEXFIX_DYNAMIC_SHARED(name, type) type* name = static_cast<type*>(::emulator::dynamic_shared())
#define SIMPLEXFIX_UNROLL
#define SIMPLEXFIX_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMPLEXFIX_AT file, line
#else
#define SIMPLEXFIX_SHARED(name, ...) __shared__ simplexfix::cuda::SharedType<__VA_ARGS__> name
#define SIMPLEXFIX_DYNAMIC_SHARED(name, type)                                \
  extern __shared__ __align__(16) unsigned char simplexfix_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(simplexfix_dynamic_shared)
#define SIMPLEXFIX_UNROLL _Pragma("unroll")
#define SIMPLEXFIX_CALLER
#define SIMPLEXFIX_AT
#endif

namespace simplexfix::cuda {

template <typename T>
struct SharedIdentity {
  using type = T;
};
template <typename T>
using SharedType = typename SharedIdentity<T>::type;  // lets a macro take an array type

constexpr unsigned kFullWarp = 0xffffffffu;

// What one thread moves by one instruction, where its address allows.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

// How many elements past a 16-byte boundary a pointer lies.
template <typename T>
SIMPLEXFIX_HD int phase(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// A barrier of the threads that share a row: of the warp, or of the block.
template <int kThreads>
__device__ __forceinline__ void sync_team(SIMPLEXFIX_CALLER) {
  if constexpr (kThreads == 32) {
#ifdef SIMPLEXFIX_EMULATED
    __syncwarp(kFullWarp, SIMPLEXFIX_AT);
#else
    __syncwarp();
#endif
  } else {
    __syncthreads(SIMPLEXFIX_AT);
  }
}

}  // namespace simplexfix::cuda
