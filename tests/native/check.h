// Buffers, failure counts and error floors of the kernel tests.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

inline int g_cases = 0, g_failures = 0;

// Counts a failure, and prints the first few.
__attribute__((format(printf, 1, 2))) inline void failed(const char* format, ...) {
  if (++g_failures > 8) return;
  std::printf("FAIL ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

#if defined(__SANITIZE_ADDRESS__)
constexpr int kGuard = 0;  // ASan has red zones of its own
#else
constexpr int kGuard = 64;
#endif

// A buffer of size elements, which starts `offset` elements past a 16-byte boundary. Every byte is 0xff: nan in the
// float types, -1 in the integers. The bytes before and after the elements must stay so.
template <typename T>
class Buffer {
 public:
  Buffer(int64_t size, int offset) : size_(size), front_(offset * sizeof(T) + (kGuard + 15) / 16 * 16) {
    bytes_ = front_ + size_t(size) * sizeof(T) + kGuard;
    memory_ = static_cast<unsigned char*>(std::malloc(bytes_));
    std::memset(memory_, 0xff, bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  T* data() { return reinterpret_cast<T*>(memory_ + front_); }
  T& operator[](int64_t i) { return data()[i]; }
  int64_t size() const { return size_; }
  bool surroundings_untouched() const {
    for (size_t i = 0; i < bytes_; ++i)
      if ((i < front_ || i >= front_ + size_t(size_) * sizeof(T)) && memory_[i] != 0xff) return false;
    return true;
  }

 private:
  int64_t size_;
  size_t front_, bytes_;
  unsigned char* memory_;
};

template <typename T>
struct Format;  // digits of the significand, and half the smallest positive number
template <>
struct Format<float> {
  static constexpr const char* kName = "float";
  static constexpr int kDigits = 24;
  static constexpr double kTiny = 0x1p-150;
};
template <>
struct Format<double> {
  static constexpr const char* kName = "double";
  static constexpr int kDigits = 53;
  static constexpr double kTiny = 0;
};
template <>
struct Format<__half> {
  static constexpr const char* kName = "half";
  static constexpr int kDigits = 11;
  static constexpr double kTiny = 0x1p-25;
};
template <>
struct Format<__nv_bfloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kDigits = 8;
  static constexpr double kTiny = 0x1p-134;
};

// The floors: the error that a result may have, however accurate the naive computation was.
//
//   sums and exponentials   kFloor roundings of the accumulating type, at the size of the largest term
//   the result's own type   one rounding, half a unit in the last place
constexpr double kFloor = 8;
template <typename A>
double floor_of(double size) {
  return kFloor * std::ldexp(size, -Format<A>::kDigits);
}
template <typename T>
double rounding_of(double value) {
  return 1.001 * std::ldexp(std::fabs(value), -Format<T>::kDigits) + Format<T>::kTiny;
}

template <typename R, typename T>
std::vector<R> widened(const T* p, int64_t n) {
  std::vector<R> v(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i)
    if constexpr (sizeof(T) == 2)
      v[i] = R(float(p[i]));
    else
      v[i] = R(p[i]);
  return v;
}
template <typename T>
double value_of(T x) {
  return widened<double>(&x, 1)[0];
}

template <typename R>
double largest_difference(const std::vector<R>& a, const std::vector<long double>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::fmax(largest, double(std::fabs((long double)a[i] - b[i])));
  return largest;
}
