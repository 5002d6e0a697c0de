// IEEE arithmetic for the calling thread while it lives: denormals kept and rounding to nearest, whatever
// the program has set (torch.set_flush_denormal sets one thread and not the next).
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace simplexfix::cpu {

class IeeeArithmetic {
 public:
#if defined(__x86_64__)
  IeeeArithmetic() : before_(_mm_getcsr()) { _mm_setcsr(0x1f80); }  // the processor's own default
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
