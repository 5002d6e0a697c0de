// The only file with shared-memory declarations and inline PTX. Two compilers read it: nvcc, and g++ with
// SIMPLEXFIX_EMULATED, for the emulator in which tests/native runs the kernels.
#pragma once
#ifndef SIMPLEXFIX_EMULATED  // the emulator is included before this file and defines CUDA's names
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif
#include <cstdint>

#include "../core/types.h"

// SIMPLEXFIX_SHARED(name, type) declares one object per block. SIMPLEXFIX_DYNAMIC_SHARED(name, type) declares a pointer
// to the dynamic shared memory of the launch, aligned to 16 bytes. SIMPLEXFIX_CALLER is a parameter and SIMPLEXFIX_AT
// its argument. With them the emulator names the barrier at which threads diverged; on a GPU both are empty. The
// variants with AND_ follow other parameters.
#ifdef SIMPLEXFIX_EMULATED
#define SIMPLEXFIX_SHARED(name, ...)                        \
  static const char name##_key __attribute__((unused)) = 0; \
  auto& name = ::emulator::static_shared<__VA_ARGS__>(&name##_key)
#define SIMPLEXFIX_DYNAMIC_SHARED(name, type) type* name = static_cast<type*>(::emulator::dynamic_shared())
#define SIMPLEXFIX_UNROLL
#define SIMPLEXFIX_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define SIMPLEXFIX_AT file, line
#define SIMPLEXFIX_AND_CALLER , SIMPLEXFIX_CALLER
#define SIMPLEXFIX_AND_AT , SIMPLEXFIX_AT
#else
#define SIMPLEXFIX_SHARED(name, ...) __shared__ simplexfix::cuda::SharedType<__VA_ARGS__> name
#define SIMPLEXFIX_DYNAMIC_SHARED(name, type)                                \
  extern __shared__ __align__(16) unsigned char simplexfix_dynamic_shared[]; \
  type* name = reinterpret_cast<type*>(simplexfix_dynamic_shared)
#define SIMPLEXFIX_UNROLL _Pragma("unroll")
#define SIMPLEXFIX_CALLER
#define SIMPLEXFIX_AT
#define SIMPLEXFIX_AND_CALLER
#define SIMPLEXFIX_AND_AT
#endif

namespace simplexfix::cuda {

template <typename T>
struct SharedIdentity {
  using type = T;
};
template <typename T>
using SharedType = typename SharedIdentity<T>::type;  // makes an array type usable in a macro

constexpr unsigned kFullWarp = 0xffffffffu;

// The elements that one thread moves with one 16-byte instruction, if the address is aligned.
template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / int(sizeof(T));
  T v[kSize];
};

// Returns the number of elements from the last 16-byte boundary to p.
template <typename T>
SIMPLEXFIX_HD int misalignment(const T* p) {
  return int(reinterpret_cast<uintptr_t>(p) % 16 / sizeof(T));
}

// A barrier for the threads that share a row: those of the warp, or of the block.
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

// Tensor cores, sm_80 and newer. All lanes of the warp must call ldmatrix and mma. A register holds a pair of 16-bit
// numbers, the one at the lower address in the low half. With g = lane / 4 and t = 2 (lane % 4), a lane holds
//
//   a[i], 16 x 16:   row g + 8 (i % 2),  columns t + 8 (i / 2) and the next
//   b[i], 16 x 8:    rows t + 8 i and the next,  column g
//   sums[i], 16 x 8: row g + 8 (i / 2),  column t + i % 2

#ifndef SIMPLEXFIX_EMULATED
__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
#endif

// Loads two or four 8 x 8 matrices of 16-bit numbers from shared memory. Lane 8 m + i passes the address of row i of
// matrix m: 8 numbers at a 16-byte boundary. (With two matrices the addresses of lanes 16 to 31 are ignored.) r[m]
// becomes the numbers t and t + 1 of row g of matrix m, or of its column g if transposed.
template <bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[4], const void* s_row SIMPLEXFIX_AND_CALLER) {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::ldmatrix<4, kTransposed>(r, s_row SIMPLEXFIX_AND_AT);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(s_row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(s_row))
                 : "memory");
#endif
}
template <bool kTransposed = false>
__device__ __forceinline__ void ldmatrix(uint32_t (&r)[2], const void* s_row SIMPLEXFIX_AND_CALLER) {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::ldmatrix<2, kTransposed>(r, s_row SIMPLEXFIX_AND_AT);
#else
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(s_row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(shared_address(s_row))
                 : "memory");
#endif
}

// sums += a b, for T = __nv_bfloat16 or __half. Products are exact. The rounding of the sum of 17 terms depends on the
// GPU, so no result may depend on its bits. (The emulator adds one by one in float.)
template <typename T>
__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2] SIMPLEXFIX_AND_CALLER) {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::mma<T>(sums, a, b SIMPLEXFIX_AND_AT);
#else
  if constexpr (std::is_same_v<T, __half>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Starts to write 16 bytes to shared memory: the first `bytes` are copied from global memory, the others are 0. Both
// addresses must be at 16-byte boundaries, also if bytes is 0 and nothing is read. This thread may read the copy after
// wait_for_copies(), other threads after a barrier that follows it.
__device__ __forceinline__ void copy_async(void* s_to, const void* g_from, int bytes SIMPLEXFIX_AND_CALLER) {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::copy_async(s_to, g_from, bytes SIMPLEXFIX_AND_AT);
#else
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(s_to)), "l"(g_from), "r"(bytes)
               : "memory");
#endif
}
// Makes a group of the copies since the last commit; it may be empty.
__device__ __forceinline__ void commit_copies() {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::commit_copies();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Blocks until all of this thread's groups except the kOpen latest are complete.
template <int kOpen>
__device__ __forceinline__ void wait_for_copies() {
#ifdef SIMPLEXFIX_EMULATED
  ::emulator::wait_for_copies(kOpen);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
#endif
}

}  // namespace simplexfix::cuda
