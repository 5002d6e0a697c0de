// Number formats of the kernels, free of torch and of CUDA headers.
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

enum class Reduction : int { kNone, kMean, kSum };
enum class Margin : int { kNone, kCosine, kAngular };
enum class Negatives : int { kZeroMask, kRemove, kInfoNce };

}  // namespace simplexfix
