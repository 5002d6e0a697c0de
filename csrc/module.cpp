// The Python module: facts about the build.  Importing it registers the operators.  No torch here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/kernels.h"

namespace py = pybind11;
using namespace py::literals;

#ifdef SIMPLEXFIX_WITH_CUDA
namespace simplexfix {
bool torch_has_cuda();  // ops/cuda_stream.cpp
}
#endif

PYBIND11_MODULE(_C, m) {
  m.def(
      "build_info",
      [] {
#ifdef SIMPLEXFIX_WITH_CUDA
        const bool cuda_usable = simplexfix::torch_has_cuda();
#else
        const bool cuda_usable = false;
#endif
        return py::dict("version"_a = SIMPLEXFIX_VERSION, "compiler"_a = __VERSION__,
                        "torch_headers"_a = SIMPLEXFIX_BUILD_TORCH, "cpu_isa"_a = simplexfix::cpu::isa(),
                        "cpu_isa_levels"_a = simplexfix::cpu::isa_levels(),
                        "cuda_archs"_a = SIMPLEXFIX_CUDA_ARCHS, "cuda_usable"_a = cuda_usable);
      },
      "What was built and what of it runs here; cuda_usable: kernels built in, and a CUDA build of torch loaded.");
}
