// torch's current CUDA stream.  aoti_torch_get_current_cuda_stream lives in libtorch_cuda.so, which a
// CPU build of torch lacks: it is looked up in the copy that torch has loaded, so that this library
// links and imports without it.
#ifdef SIMPLEXFIX_WITH_CUDA
#include "cuda_stream.h"

#include <dlfcn.h>

namespace simplexfix {
namespace {
using StreamGetter = AOTITorchError (*)(int32_t device_index, void** stream);

StreamGetter stream_getter() {
  static const StreamGetter getter = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return library ? reinterpret_cast<StreamGetter>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  return getter;
}
}  // namespace

bool torch_has_cuda() { return stream_getter() != nullptr; }

void* current_cuda_stream(int32_t device) {
  const StreamGetter get = stream_getter();
  if (!get) throw std::runtime_error("this torch is built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

}  // namespace simplexfix
#endif
