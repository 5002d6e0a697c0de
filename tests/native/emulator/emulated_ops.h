// Included before each file of csrc/ops in the library of emulated operators. Registrations for CUDA go to the CPU
// instead, in a namespace of their own. Registrations for the CPU are dropped. So the CUDA operators run on CPU
// tensors, with the kernels in the emulator.
#pragma once
#define SIMPLEXFIX_WITH_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

namespace torch::stable::no_accelerator {
struct DeviceGuard {
  explicit DeviceGuard(int32_t) {}
};
}  // namespace torch::stable::no_accelerator
#define accelerator no_accelerator

#undef STABLE_TORCH_LIBRARY_FRAGMENT
#define STABLE_TORCH_LIBRARY_FRAGMENT(name, m) _STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix_emulated, m, C10_UID)
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, device, m) SIMPLEXFIX_IMPL_##device(m, C10_UID)
#define SIMPLEXFIX_IMPL_CUDA(m, id) _STABLE_TORCH_LIBRARY_IMPL(simplexfix_emulated, CPU, m, id)
#define SIMPLEXFIX_IMPL_CPU(m, id) SIMPLEXFIX_LEFT_OUT(m, id)
#define SIMPLEXFIX_LEFT_OUT(m, id) \
  template <typename Library>      \
  [[maybe_unused]] static void left_out_##id(Library& m)
