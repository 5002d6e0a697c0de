// Inline scalar exp for per-row values. A libm call would spill vector registers, and its result would depend on the C
// library. CUDA kernels use std::exp; their emulator uses this function.
#pragma once
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>

#include "types.h"

namespace simplexfix {

#ifdef __CUDACC__
template <typename A>
SIMPLEXFIX_HD A scalar_exp(A x) {
  return std::exp(x);
}
#else
template <typename A>
struct FloatFormat;
template <>
struct FloatFormat<float> {
  using Bits = uint32_t;
  static constexpr int kMantissa = 23, kExponentBias = 127;
  static constexpr float kRound = 0x1.8p23f;  // x + kRound rounds x to an integer, in the low bits of the sum
  static constexpr float kLn2 = 0x1.62e4p-1f, kLn2Rest = 0x1.7f7d1cp-20f;  // n * kLn2 is exact
  static constexpr int kTerms = 8;
};
template <>
struct FloatFormat<double> {
  using Bits = uint64_t;
  static constexpr int kMantissa = 52, kExponentBias = 1023;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLn2 = 0x1.62e42feep-1, kLn2Rest = 0x1.a39ef35793c76p-33;
  static constexpr int kTerms = 14;
};

// Returns exp(x) for x <= 0 or nan, with an error below 2 ulp. Where exp(x) is below the smallest normal number,
// the result is 0 or a denormal, without this bound.
//   x = n ln 2 + r;  exp(r) = 1 + r + r^2 / 2! + ...
template <typename A>
SIMPLEXFIX_HD A scalar_exp(A x) {
  using F = FloatFormat<A>;
  constexpr auto inverse_factorials = [] {
    std::array<A, F::kTerms> table{};
    double factorial = 1;
    for (int k = 0; k < F::kTerms; factorial *= ++k) table[size_t(k)] = A(1 / factorial);
    return table;
  }();
  const A shifted = x * A(1.4426950408889634) + F::kRound, n = shifted - F::kRound;
  const A r = (x - n * F::kLn2) - n * F::kLn2Rest;
  A series = inverse_factorials.back();
#pragma GCC unroll 16
  for (int k = F::kTerms - 2; k >= 0; --k) series = series * r + inverse_factorials[size_t(k)];
  using Bits = typename F::Bits;  // the low bits of shifted hold n
  const A power = std::bit_cast<A>((std::bit_cast<Bits>(shifted) + F::kExponentBias) << F::kMantissa);
  return n < A(1 - F::kExponentBias) ? A(0) : series * power;
}
#endif

}  // namespace simplexfix
