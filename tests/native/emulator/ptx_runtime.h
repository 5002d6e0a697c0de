// Runtime of the C++ that ptx2cpp.py writes. Registers are unsigned integers of their width. Each instruction reads and
// writes them as the type that it names.
#pragma once
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "emulator.h"

namespace ptx {

template <typename T, int N>
struct alignas(sizeof(T) * N) Lanes {
  T v[N];
};
template <int N>
struct Bytes {  // a kernel's parameter struct
  char b[N];
};

// Returns a register's value as T; a wider register gives its low bytes.
template <typename T, typename U>
T as(U u) {
  static_assert(sizeof(T) <= sizeof(U));
  T t;
  std::memcpy(static_cast<void*>(&t), &u, sizeof t);  // x86: the low bytes come first
  return t;
}
// Sets a register. A narrower integer is extended by its sign, anything else by zeros.
template <typename R, typename T>
void set(R& r, T t) {
  if constexpr (std::is_integral_v<T>) {
    r = static_cast<R>(t);
  } else {
    static_assert(sizeof(T) <= sizeof(R));
    r = 0;
    std::memcpy(&r, &t, sizeof t);
  }
}

// Returns p as a pointer to V. Aborts the launch if it is not aligned as a GPU requires.
template <typename V>
V* aligned(char* p, const char* file, int line) {
  if (reinterpret_cast<uintptr_t>(p) % alignof(V)) emulator::die("misaligned access", {file, line});
  return reinterpret_cast<V*>(p);
}

// Shared memory: object i of a kernel's file has the addresses from i << 20 on. Size 0 marks the dynamic object.
struct SharedVariable {
  int size;
  char key;
};
inline char* shared_memory(SharedVariable* variables, uint64_t address) {
  SharedVariable& v = variables[address >> 20];
  void* base = v.size ? emulator::shared_object(&v.key, size_t(v.size)) : emulator::dynamic_shared();
  return static_cast<char*>(base) + (address & 0xfffff);
}

// The inverse: returns the address of a pointer. The dynamic object comes last, since its size is not known here.
inline uint64_t shared_address(SharedVariable* variables, size_t count, uint64_t pointer) {
  for (const bool dynamic : {false, true})
    for (size_t i = 0; i < count; ++i) {
      if (dynamic != !variables[i].size) continue;
      const auto base = reinterpret_cast<uintptr_t>(shared_memory(variables, i << 20));
      const uint64_t bytes = dynamic ? uint64_t(1) << 20 : uint64_t(variables[i].size);
      if (pointer >= base && pointer < base + bytes) return (i << 20) + (pointer - base);
    }
  emulator::die("a pointer that does not point into shared memory", {"ptx", 0});
}

// If one argument is nan, returns the other. -0 is less than +0.
template <typename T>
T min(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  if constexpr (std::is_floating_point_v<T>)
    if (a == b) return std::signbit(a) ? a : b;
  return b < a ? b : a;
}
template <typename T>
T max(T a, T b) {
  if (a != a || b != b) return a != a ? b : a;
  if constexpr (std::is_floating_point_v<T>)
    if (a == b) return std::signbit(a) ? b : a;
  return a < b ? b : a;
}
template <typename T>
bool unordered(T a, T b) {
  return a != a || b != b;
}
template <typename T>
T shift_left(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(0) : T(a << n);
}
template <typename T>
T shift_right(T a, uint32_t n) {
  const uint32_t bits = sizeof(T) * 8;
  return n < bits ? T(a >> n) : a < T(0) ? T(-1) : T(0);
}

inline float flushed(float x) { return std::fabs(x) < 0x1p-126f ? std::copysign(0.f, x) : x; }
inline float saturated(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // nan to 0

class Rounding {
 public:
  explicit Rounding(int mode) : before_(std::fegetround()) { std::fesetround(mode); }
  ~Rounding() { std::fesetround(before_); }

 private:
  int before_;
};
inline __attribute__((noinline)) float fma_down(float a, float b, float c) {
  const Rounding rounding(FE_DOWNWARD);
  volatile float x = a, r = std::fma(x, b, c);
  return r;
}
inline __attribute__((noinline)) float add_to_zero(float a, float b) {
  const Rounding rounding(FE_TOWARDZERO);
  volatile float x = a, r = x + b;
  return r;
}
// 1 / x with 20 correct bits and a zero low half: the start of a Newton iteration.
inline double reciprocal_start(double x) {
  return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / x) & 0xffffffff00000000u);
}

}  // namespace ptx
