// Host code shared by the CUDA operators: device and stream, torch's matrix products, dtypes, versions, error messages.
#pragma once
#include "../cuda/kernels.h"
#include "common.h"

namespace simplexfix {

bool torch_has_cuda();                      // whether the loaded torch is a CUDA build
void* current_cuda_stream(int32_t device);  // of the loaded torch; throws for a CPU build

// Returns the device of an operator's first tensor. Call it before any other check: a raw call may have this tensor on
// the CPU and be dispatched to CUDA for another argument.
int32_t cuda_device(const Tensor& tensor, const char* name);

// out = a b, or out += a b if add, by the loaded torch. For float32, torch.set_float32_matmul_precision applies.
void cuda_matrix_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add);

inline cuda::DType cuda_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return cuda::DType::kDouble;
    case ScalarType::Float: return cuda::DType::kFloat;
    case ScalarType::Half: return cuda::DType::kHalf;
    default: return cuda::DType::kBFloat16;  // checked by check_rows
  }
}

// Calls f(stream), which launches kernels and returns nullptr or an error message. Throws if there is an error.
template <typename F>
void launch(int32_t device, const char* name, F&& f) {
  const char* error = f(current_cuda_stream(device));
  if (error) throw std::runtime_error(message(name, " failed on cuda:", device, ": ", error));
}

}  // namespace simplexfix
