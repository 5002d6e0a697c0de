// Sets IEEE arithmetic for the calling thread during its lifetime: denormals kept, rounding to nearest. A program may
// have changed it for some threads only (torch.set_flush_denormal does).
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace simplexfix::cpu {

class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the processor's default
  ~IeeeArithmetic() { _mm_setcsr(before_); }

 private:
  unsigned before_;

 public:
#else
  IeeeArithmetic() {}
#endif
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;
};

}  // namespace simplexfix::cpu
