// Replaces csrc/ops/cuda_stream.cpp: there is no stream, and torch computes matrix products on the CPU.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "../../../csrc/ops/cuda_stream.h"

namespace simplexfix {
bool torch_has_cuda() { return true; }
void* current_cuda_stream(int32_t) { return nullptr; }
int32_t cuda_device(const Tensor&, const char*) { return 0; }

void cuda_matrix_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  if (add) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), a.get(), b.get()));
  }
}
}  // namespace simplexfix
