// Number formats and shared arithmetic of the kernels, without torch or CUDA headers.
#pragma once
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#define SIMPLEXFIX_HD __host__ __device__ __forceinline__
#else
#define SIMPLEXFIX_HD inline __attribute__((always_inline))
#endif

namespace simplexfix {

// 16-bit floats as the CPU kernels store them: bits, converted when a row is loaded or stored.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// The type of a row's sums, exponentials and losses: double for double, float otherwise.
template <typename T>
using accumulate_t = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Forces the product v to be rounded before it is used. Where a sum has two products, a compiler fuses one of them, and
// may choose differently in each copy of a function. With this barrier a row has the same bits in every copy on the
// CPU. On a GPU it does nothing: a row is always computed by the same copy, which its length and dtype determine.
template <typename V>
SIMPLEXFIX_HD V rounded(V v) {
#if defined(__CUDACC__)
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
