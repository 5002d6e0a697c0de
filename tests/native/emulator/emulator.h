// Runs CUDA kernels on the CPU; test code only. Each CUDA thread is a fiber. The fibers of a block take turns on one OS
// thread, and switch only at barriers and warp collectives.
//
//   g++ -std=c++20 -include emulator.h -isystem $CUDA_HOME/include -x c++ kernels.cu tests.cpp
//       -fsanitize=address,undefined   accesses out of bounds or misaligned, global and shared
//       -fsanitize=thread              races: only barriers and fences order accesses, not a switch of
//                                      fibers, so a missing one is found whatever the timing
//
// Shared memory is new for each block, filled with nan, with red zones under ASan. A kernel that diverges at barriers
// or collectives, or deadlocks, ends the launch with an error that names both places.
#pragma once
#define SIMPLEXFIX_EMULATED 1
// Host-side types only (dim3, float4, ...); bf16 and fp16 also work on the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __constant__
#undef __forceinline__
#undef __launch_bounds__
#undef __align__
#define __global__ __attribute__((noipa))  // remains one symbol, which the PTX layer can replace
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#include "cuda_names.h"
#include "launch.h"
#include "tensor_core.h"
