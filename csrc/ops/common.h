// What every operator's front needs of torch: LibTorch's stable ABI alone, so that one build runs
// beside any torch from 2.11 on.
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

// Python sees a ValueError with this message alone: STD_TORCH_CHECK would make it a RuntimeError, and name the folder
// of the build.
#define SIMPLEXFIX_CHECK(condition, ...)                                             \
  do {                                                                               \
    if (!(condition)) throw std::invalid_argument(simplexfix::message(__VA_ARGS__)); \
  } while (false)

// torch's, from 2.13 on; weak, so that the library loads beside an older one.
extern "C" const char* torch_exception_get_what_without_backtrace() __attribute__((weak));

namespace simplexfix {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
std::string message(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Double || type == ScalarType::Float || type == ScalarType::Half ||
         type == ScalarType::BFloat16;
}
inline ScalarType accumulate_type(ScalarType type) {
  return type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Calls f(T{}) with the kernels' type T of a floating tensor.
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

// torch's own is asked by name, and the answer takes a microsecond, where there is something to do.
inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

// z as rows of d numbers side by side; rows themselves may lie at any stride.
inline Tensor with_dense_rows(const Tensor& z) { return z.size(1) <= 1 || z.stride(1) == 1 ? z : as_contiguous(z); }

inline void check_rows(const Tensor& z, const char* name) {
  SIMPLEXFIX_CHECK(z.dim() == 2, name, " must have 2 dimensions, got ", z.dim());
  SIMPLEXFIX_CHECK(is_floating(z.scalar_type()), name, " must be floating, got ",
                   torch::headeronly::toString(z.scalar_type()));
  SIMPLEXFIX_CHECK(z.size(1) >= 1 && z.size(1) < (int64_t(1) << 31) - 1, name,
                   " must have between 1 and 2^31 - 2 columns, got ", z.size(1));
}

// Rows per task such that a task is worth the hand-over to another thread.
inline int64_t rows_per_task(int64_t cols) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cols)); }

// An operator as it is registered.  Where torch fails within it, most often for want of memory, Python sees torch's own
// words ("CUDA out of memory. Tried to allocate ..."): the stable ABI says only where in its headers it noticed.
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
                                   : "torch failed, for want of memory most likely: its own words stand on stderr");
    }
  }
};
#define SIMPLEXFIX_OPERATOR(function) TORCH_BOX(&simplexfix::Operator<&simplexfix::function>::call)

}  // namespace simplexfix
