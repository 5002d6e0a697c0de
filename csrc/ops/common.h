// Shared code of the operators' front files: checks, dtype dispatch, rows on threads, error translation. It uses only
// LibTorch's stable ABI, so one build runs with any torch >= 2.11.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../core/types.h"
#include "../cpu/parallel.h"

// Throws std::invalid_argument, which Python receives as a ValueError with exactly this message. STD_TORCH_CHECK would
// raise a RuntimeError whose text names the build folder.
#define SIMPLEXFIX_CHECK(condition, ...)                                             \
  do {                                                                               \
    if (!(condition)) throw std::invalid_argument(simplexfix::message(__VA_ARGS__)); \
  } while (false)

// torch >= 2.13 exports this. The weak reference lets the library load with older versions.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace simplexfix {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Words>
std::string message(const Words&... words) {
  std::ostringstream out;
  (out << ... << words);
  return out.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}), where T is the kernels' type for a floating-point dtype.
template <typename F>
void dispatch_floating(ScalarType type, F&& f) {
  switch (type) {
    case ScalarType::Double: return f(double{});
    case ScalarType::Float: return f(float{});
    case ScalarType::Half: return f(Half{});
    case ScalarType::BFloat16: return f(BFloat16{});
    default: SIMPLEXFIX_CHECK(false, "expected a floating dtype, got ", torch::headeronly::toString(type));
  }
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Dispatching `contiguous` costs about 1 us; skip it for contiguous tensors.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// Returns z [B, d] with the d numbers of each row contiguous; the row stride may be anything.
inline Tensor with_dense_rows(const Tensor& z) { return z.size(1) <= 1 || z.stride(1) == 1 ? z : as_contiguous(z); }

inline std::string shape_of(const Tensor& tensor) {
  std::string text;
  for (int64_t i = 0; i < tensor.dim(); ++i) text += (i ? ", " : "") + std::to_string(tensor.size(i));
  return "[" + text + "]";
}

inline void check_rows(const Tensor& z, const char* name) {
  SIMPLEXFIX_CHECK(z.dim() == 2, name, " must have 2 dimensions, got ", shape_of(z));
  SIMPLEXFIX_CHECK(is_floating(z.scalar_type()), name, " must be floating, got ",
                   torch::headeronly::toString(z.scalar_type()));
  SIMPLEXFIX_CHECK(z.size(1) >= 1 && z.size(1) < (int64_t(1) << 31) - 1, name,
                   " must have between 1 and 2^31 - 2 columns, got ", z.size(1));
}

// Calls work(begin, end) on ranges that together cover all rows, on at most as many threads as torch uses. cols is the
// number of elements of a row.
template <typename F>
void for_rows(int64_t rows, int64_t cols, const F& work) {
  cpu::parallel_ranges(rows, cols, torch::stable::get_num_threads(), work);
}

// Wraps an operator for registration. When torch fails inside it, mostly for lack of memory, the stable ABI reports
// only a line of its own headers. The wrapper rethrows with torch's message ("CUDA out of memory. Tried to allocate
// ...") where torch exports it.
template <auto F>
struct Operator;
template <typename Result, typename... Args, Result (*F)(Args...)>
struct Operator<F> {
  static Result call(Args... args) {
    try {
      return F(std::move(args)...);
    } catch (const std::runtime_error& error) {
      if (!std::strstr(error.what(), "API call failed")) throw;
      throw std::runtime_error(torch_exception_get_what_without_backtrace
                                   ? torch_exception_get_what_without_backtrace()
                                   : "a call of torch failed, mostly for lack of memory; torch's message is on stderr");
    }
  }
};
#define SIMPLEXFIX_OPERATOR(...) TORCH_BOX((&simplexfix::Operator<&simplexfix::__VA_ARGS__>::call))

}  // namespace simplexfix
