// The Python module: build information, the index class, and Ctrl-C. Importing it registers the operators. This file
// does not use torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include "cpu/cosine_index.h"
#include "cpu/fork.h"
#include "cpu/interrupt.h"
#include "cpu/kernels.h"

namespace py = pybind11;
using namespace py::literals;

#ifdef SIMPLEXFIX_WITH_CUDA
namespace simplexfix {
// Defined in ops/cuda_stream.cpp.
bool torch_has_cuda();
std::pair<int, int> cuda_versions();
}  // namespace simplexfix
#endif

namespace {
using simplexfix::cpu::CosineIndex;
using simplexfix::cpu::Interrupted;
using simplexfix::cpu::RowType;
using simplexfix::cpu::Selection;
// simplexfix/retrieval/index.py has checked and converted the arguments. Calls release the GIL.
using Floats = py::array_t<float, py::array::c_style>;
using Ids = py::array_t<int64_t, py::array::c_style>;

[[noreturn]] void raise_os_error(const std::system_error& error, const std::string& path) {
  PyErr_SetObject(PyExc_OSError, py::make_tuple(error.code().value(), error.code().message(),
                                                py::reinterpret_steal<py::object>(PyUnicode_DecodeFSDefaultAndSize(
                                                    path.data(), py::ssize_t(path.size()))))
                                     .ptr());
  throw py::error_already_set();
}

// The exception that a signal handler raised during a call, mostly KeyboardInterrupt. The GIL guards it. It is never
// destroyed, since Python no longer exists at exit.
std::optional<py::error_already_set>& g_raised = *new std::optional<py::error_already_set>;

// Python's main thread, the only one that runs signal handlers. In a forked child it is the thread that forked.
std::atomic<unsigned long> g_main_thread{0};
const simplexfix::cpu::ForkHook g_main_thread_hook{[](void*) noexcept { g_main_thread = PyThread_get_thread_ident(); },
                                                   nullptr};

// Runs the handlers of pending signals. Returns whether one raised an exception.
bool handler_raised() {
  if (PyThread_get_thread_ident() != g_main_thread) return false;  // checked first: taking the GIL may be slow
  const py::gil_scoped_acquire acquire;
  g_raised.reset();
  if (PyErr_CheckSignals() == 0) return false;
  g_raised.emplace();
  return true;
}

void raise_interrupt() {
  if (!g_raised) return;
  std::optional<py::error_already_set> raised;
  raised.swap(g_raised);
  raised->restore();
  throw py::error_already_set();
}

void bind_interrupts(py::module_& m) {
  g_main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  simplexfix::cpu::set_interrupt_check(handler_raised);
  py::register_local_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const Interrupted& error) {
      if (!g_raised) return PyErr_SetString(PyExc_RuntimeError, error.what());
      g_raised->restore();
      g_raised.reset();
    }
  });
  m.def("raise_interrupt", raise_interrupt,
        "Raises the exception of a signal handler that ended the last operator; returns None if there is none.");
}

py::array_t<float> array_of(std::vector<float>&& numbers, int64_t columns) {
  auto* const owned = new std::vector<float>(std::move(numbers));
  const py::capsule owner(owned, [](void* p) { delete static_cast<std::vector<float>*>(p); });
  return py::array_t<float>({int64_t(owned->size()) / columns, columns}, owned->data(), owner);
}

py::array_t<int64_t> array_of(const std::vector<int64_t>& numbers) {
  return py::array_t<int64_t>(py::ssize_t(numbers.size()), numbers.data());
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
             return self.add(vectors.data(), vectors.shape(0), ids ? ids->data() : nullptr);
           })
      .def("__contains__", &CosineIndex::contains, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("ids",
                             [](const CosineIndex& self) {
                               std::vector<int64_t> ids;
                               {
                                 const py::gil_scoped_release release;
                                 ids = self.ids();
                               }
                               return array_of(ids);
                             })
      .def("rows",
           [](const CosineIndex& self) {
             simplexfix::cpu::IndexRows rows;
             {
               const py::gil_scoped_release release;
               rows = self.rows();
             }
             return py::make_tuple(array_of(rows.ids), array_of(std::move(rows.vectors), self.dim()));
           })
      .def("vectors",
           [](const CosineIndex& self, const Ids& ids) {
             py::array_t<float> out({ids.shape(0), py::ssize_t(self.dim())});
             float* const to = out.mutable_data();
             try {
               const py::gil_scoped_release release;
               self.vectors(ids.data(), ids.shape(0), to);
             } catch (const std::out_of_range& error) {
               throw py::key_error(error.what());
             }
             return out;
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
      .def(
          "search",
          [](const CosineIndex& self, const Floats& query, int64_t k, const std::optional<Ids>& ids, bool exclude) {
            const py::ssize_t shape[] = {query.shape(0), k};
            py::array_t<float> scores(shape);
            py::array_t<int64_t> found(shape);
            const Selection selection{ids ? ids->data() : nullptr, ids ? ids->shape(0) : 0, exclude};
            float* const to_scores = scores.mutable_data();
            int64_t* const to_found = found.mutable_data();
            try {
              const py::gil_scoped_release release;
              self.search(query.data(), query.shape(0), k, to_scores, to_found, ids ? &selection : nullptr);
            } catch (const std::out_of_range& error) {
              throw py::key_error(error.what());
            }
            return py::make_tuple(scores, found);
          },
          "query"_a, "k"_a, "ids"_a = py::none(), "exclude"_a = false)
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
        } catch (const Interrupted&) {
          throw;
        } catch (const std::runtime_error& error) {
          throw py::value_error(error.what());
        }
      });
}
}  // namespace

PYBIND11_MODULE(_C, m) {
  bind_interrupts(m);
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
      "Facts about the build.  cuda_usable: it has CUDA kernels, and the loaded torch is a CUDA build.");
#ifdef SIMPLEXFIX_WITH_CUDA
  m.def("cuda_versions", &simplexfix::cuda_versions,
        "Returns the version of the linked CUDA runtime, and the newest that the driver supports (0 without one).  "
        "13000 is 13.0.");
#endif
}
