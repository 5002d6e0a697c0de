// Sets the processor's default arithmetic for the calling thread during its lifetime: denormals kept, rounding to
// nearest. A program may have changed it for some threads only (torch.set_flush_denormal does).
#pragma once
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif
#include <cstdint>

namespace simplexfix::cpu {

class IeeeArithmetic {
 public:
  IeeeArithmetic() : before_(get()) { set(kDefault); }
  ~IeeeArithmetic() { set(before_); }
  IeeeArithmetic(const IeeeArithmetic&) = delete;
  IeeeArithmetic& operator=(const IeeeArithmetic&) = delete;

 private:
#if defined(__x86_64__)
  static constexpr unsigned kDefault = 0x1f80;
  static unsigned get() { return _mm_getcsr(); }
  static void set(unsigned mode) { _mm_setcsr(mode); }
  unsigned before_;
#elif defined(__aarch64__)
  static constexpr uint64_t kDefault = 0;
  static uint64_t get() {
    uint64_t mode;
    asm volatile("mrs %0, fpcr" : "=r"(mode));
    return mode;
  }
  static void set(uint64_t mode) { asm volatile("msr fpcr, %0" : : "r"(mode) : "memory"); }
  uint64_t before_;
#else
  static constexpr int kDefault = 0;
  static int get() { return 0; }
  static void set(int) {}
  int before_;
#endif
};

}  // namespace simplexfix::cpu
