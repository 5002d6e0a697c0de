// Number formats of the kernels, free of torch and of CUDA headers; and what arithmetic all need.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define SIMPLEXFIX_HD __host__ __device__ __forceinline__
#else
#define SIMPLEXFIX_HD inline __attribute__((always_inline))
#endif

namespace simplexfix {

// Storage of 16-bit floats as the CPU kernels see it: bits, converted where a row is read or written.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Sums, exponentials and losses of a row: double for double, float for everything narrower.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// v, a product, rounded before what follows.  Where two products meet in a sum, compilers fuse one of them with it, in
// each copy of a function the one that they like; a row has the same bits whichever copy it comes from.
template <typename V>
SIMPLEXFIX_HD V rounded(V v) {
#if defined(__CUDACC__)  // each kernel is one copy
#elif defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
  return v;
}

SIMPLEXFIX_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

enum class Reduction : int { kNone, kMean, kSum };
enum class Margin : int { kNone, kCosine, kAngular };
enum class Negatives : int { kZeroMask, kRemove, kInfoNce };

}  // namespace simplexfix
