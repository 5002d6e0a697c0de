// Access to CUDA. A CPU build of torch has no libtorch_cuda.so. Its functions are therefore looked up at run time, in
// the copy that torch has loaded, and this library links and imports without it.
#ifdef SIMPLEXFIX_WITH_CUDA
#include "cuda_stream.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>

// The CUDA runtime that nvcc links in has these functions. They are declared here because the C++ compiler may not find
// CUDA's headers.
extern "C" int cudaRuntimeGetVersion(int* version);
extern "C" int cudaDriverGetVersion(int* version);

namespace simplexfix {
namespace {
void* find(const char* name) {
  void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
  return library ? dlsym(library, name) : nullptr;
}

using StreamGetter = AOTITorchError (*)(int32_t device_index, void** stream);

StreamGetter stream_getter() {
  static const auto getter = reinterpret_cast<StreamGetter>(find("aoti_torch_get_current_cuda_stream"));
  return getter;
}

template <typename F>
F* loaded(F* function, const char* name) {
  if (!function)
    throw std::runtime_error(
        message("the loaded torch is a CPU build without ", name, ": install a CUDA build of torch"));
  return function;
}
}  // namespace

bool torch_has_cuda() { return stream_getter() != nullptr; }

std::pair<int, int> cuda_versions() {
  std::pair<int, int> versions{0, 0};
  cudaRuntimeGetVersion(&versions.first);
  cudaDriverGetVersion(&versions.second);
  return versions;
}

int32_t cuda_device(const Tensor& tensor, const char* name) {
  SIMPLEXFIX_CHECK(tensor.is_cuda(), name, " is not on a GPU, but other arguments are: move all to one device");
  return tensor.get_device_index();
}

void* current_cuda_stream(int32_t device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(loaded(stream_getter(), "CUDA streams")(device, &stream));
  return stream;
}

void cuda_matrix_product(const Tensor& out, const Tensor& a, const Tensor& b, bool add) {
  static const auto mm = reinterpret_cast<decltype(&aoti_torch_cuda_mm_out)>(find("aoti_torch_cuda_mm_out"));
  static const auto addmm = reinterpret_cast<decltype(&aoti_torch_cuda_addmm_out)>(find("aoti_torch_cuda_addmm_out"));
  if (add) {
    TORCH_ERROR_CODE_CHECK(loaded(addmm, "CUDA addmm")(out.get(), out.get(), a.get(), b.get(), 1, 1));
  } else {
    TORCH_ERROR_CODE_CHECK(loaded(mm, "CUDA mm")(out.get(), a.get(), b.get()));
  }
}

}  // namespace simplexfix
#endif
