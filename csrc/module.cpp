// The Python module: facts about the build, and the index class.  Importing it registers the operators.  No torch here.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>

#include "cpu/cosine_index.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace py::literals;

#ifdef SIMPLEXFIX_WITH_CUDA
namespace simplexfix {
// ops/cuda_stream.cpp
bool torch_has_cuda();
std::pair<int, int> cuda_versions();
}  // namespace simplexfix
#endif

namespace {
using simplexfix::cpu::CosineIndex;
using simplexfix::cpu::RowType;
// simplexfix/retrieval/index.py has checked and converted what comes in; a call lets other Python threads run.
using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style>;

[[noreturn]] void raise_os_error(const std::system_error& error, const std::string& path) {
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.code().message(),
                                                py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(
                                                    path.data(), py::ssize_t(path.size()))))
                                     .ptr());
  throw py::error_already_set();
}

void bind_cosine_index(py::module_& m) {
  py::class_<CosineIndex>(m, "CosineIndex")
      .def(py::init([](int64_t dim, const std::string& dtype, int64_t threads) {
        return std::make_unique<CosineIndex>(dim, dtype == "bfloat16" ? RowType::kBFloat16 : RowType::kFloat, threads);
      }))
      .def_property_readonly("dim", &CosineIndex::dim)
      .def_property_readonly(
          "dtype", [](const CosineIndex& self) { return self.type() == RowType::kBFloat16 ? "bfloat16" : "float32"; })
      .def_property_readonly("threads", &CosineIndex::threads)
      .def_property_readonly("nbytes",
                             [](const CosineIndex& self) {
                               const py::gil_scoped_release release;
                               return self.bytes();
                             })
      .def("__len__", &CosineIndex::size, py::call_guard<py::gil_scoped_release>())
      .def("add",
           [](CosineIndex& self, const Floats& vectors, const std::optional<Ids>& ids) {
             const py::gil_scoped_release release;
             self.add(vectors.data(), vectors.shape(0), ids ? ids->data() : nullptr);
           })
      .def("remove",
           [](CosineIndex& self, const Ids& ids) {
             try {
               const py::gil_scoped_release release;
               self.remove(ids.data(), ids.shape(0));
             } catch (const std::out_of_range& error) {
               throw py::key_error(error.what());
             }
           })
      .def("search",
           [](const CosineIndex& self, const Floats& query, int64_t k) {
             const py::ssize_t shape[] = {query.shape(0), k};
             py::array_t<float> scores(shape);
             py::array_t<int64_t> ids(shape);
             {
               float* const to_scores = scores.mutable_data();
               int64_t* const to_ids = ids.mutable_data();
               const py::gil_scoped_release release;
               self.search(query.data(), query.shape(0), k, to_scores, to_ids);
             }
             return py::make_tuple(scores, ids);
           })
      .def("save",
           [](const CosineIndex& self, const std::string& path) {
             try {
               const py::gil_scoped_release release;
               self.save(path);
             } catch (const std::system_error& error) {
               raise_os_error(error, path);
             }
           })
      .def_static("load", [](const std::string& path, int64_t threads) {
        try {
          const py::gil_scoped_release release;
          return CosineIndex::load(path, threads);
        } catch (const std::system_error& error) {
          raise_os_error(error, path);
        } catch (const std::runtime_error& error) {
          throw py::value_error(error.what());
        }
      });
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_cosine_index(m);
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
                        "cpu_isa_levels"_a = simplexfix::cpu::isa_levels(), "cuda_archs"_a = SIMPLEXFIX_CUDA_ARCHS,
                        "cuda_usable"_a = cuda_usable);
      },
      "What was built and what of it runs here; cuda_usable: kernels built in, and a CUDA build of torch loaded.");
#ifdef SIMPLEXFIX_WITH_CUDA
  m.def("cuda_versions", &simplexfix::cuda_versions,
        "Of the CUDA runtime built in, and the newest that the driver serves, 0 without one; 13000 is 13.0.");
#endif
}
