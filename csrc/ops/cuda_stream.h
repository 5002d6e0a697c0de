// Launch glue of the CUDA operators: device and stream, torch's matrix products, dtypes, versions, and errors turned
// into messages.
#pragma once
#include "../cuda/kernels.h"
#include "common.h"

namespace simplexfix {

bool torch_has_cuda();                      // whether the torch that is loaded is a CUDA build
void* current_cuda_stream(int32_t device);  // of that torch; throws where there is none

// The device of an operator's first tensor.  Asked before anything else: a raw call may have it on the CPU, and only
// another one, which brought the call here, on a GPU.
int32_t cuda_device(const Tensor& tensor, const char* name);

// out = a b, or out += a b, by the torch that is loaded: float32 as torch.set_float32_matmul_precision says
void cuda_matrix_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add);

inline cuda::DType cuda_dtype(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return cuda::DType::kDouble;
    case ScalarType::Float: return cuda::DType::kFloat;
    case ScalarType::Half: return cuda::DType::kHalf;
    default: return cuda::DType::kBFloat16;  // checked by check_rows
  }
}

// f(stream) launches and returns nullptr, or what went wrong.
template <typename F>
void launch(int32_t device, const char* name, F&& f) {
  const char* error = f(current_cuda_stream(device));
  if (error) throw std::runtime_error(message(name, " failed on cuda:", device, ": ", error));
}

}  // namespace simplexfix
