// simplexfix::simplex_logits and its backward: checks, allocation, dispatch.
#include "common.h"

#include <limits>

#include "../cpu/kernels.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {

struct LogitsCall {
  Tensor z, gradient, out;
  int64_t rows, d, z_stride;
};

LogitsCall check(const Tensor& z, const Tensor* gradient, double scale) {
  check_rows(z, "z");
  SIMPLEXFIX_CHECK(scale > 0 && scale <= std::numeric_limits<double>::max(), "scale must be positive and finite, got ",
                   scale);
  const int64_t rows = z.size(0), d = z.size(1);
  LogitsCall call{with_dense_rows(z), {}, {}, rows, d, d};
  if (rows > 1) call.z_stride = call.z.stride(0);
  if (gradient) {
    SIMPLEXFIX_CHECK(gradient->dim() == 2 && gradient->size(0) == rows && gradient->size(1) == d + 1,
                     "gradient must have shape [", rows, ", ", d + 1, "], got ", shape_of(*gradient));
    SIMPLEXFIX_CHECK(gradient->scalar_type() == z.scalar_type(), "gradient must have the dtype of z, ",
                     torch::headeronly::toString(z.scalar_type()), ", got ",
                     torch::headeronly::toString(gradient->scalar_type()));
    SIMPLEXFIX_CHECK(gradient->device() == z.device(), "gradient and z must be on the same device");
    call.gradient = as_contiguous(*gradient);
  }
  call.out = torch::stable::new_empty(z, {rows, gradient ? d : d + 1});
  return call;
}

void run_cpu(const LogitsCall& call, bool backward, bool normalize, double scale) {
  dispatch_floating(call.z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const cpu::LogitsArgs<T> args{data<T>(call.z),
                                  call.z_stride,
                                  backward ? data<T>(call.gradient) : nullptr,
                                  mutable_data<T>(call.out),
                                  call.d,
                                  normalize,
                                  accumulate_t<T>(scale),
                                  Simplex::of_dimension(call.d)};
    const auto rows = backward ? cpu::kernels<T>().simplex_logits_backward : cpu::kernels<T>().simplex_logits;
    for_rows(call.rows, call.d, [&](int64_t begin, int64_t end) { rows(args, begin, end); });
  });
}

Tensor simplex_logits_cpu(Tensor z, bool normalize, double scale) {
  const LogitsCall call = check(z, nullptr, scale);
  run_cpu(call, false, normalize, scale);
  return call.out;
}

Tensor simplex_logits_backward_cpu(Tensor gradient, Tensor z, bool normalize, double scale) {
  const LogitsCall call = check(z, &gradient, scale);
  run_cpu(call, true, normalize, scale);
  return call.out;
}

#ifdef SIMPLEXFIX_WITH_CUDA
void run_cuda(const LogitsCall& call, bool backward, bool normalize, double scale) {
  launch(call.z.get_device_index(), "simplex_logits", [&](void* stream) {
    const cuda::LogitsArgs args{call.z.const_data_ptr(),
                                call.z_stride,
                                backward ? call.gradient.const_data_ptr() : nullptr,
                                call.out.mutable_data_ptr(),
                                call.rows,
                                call.d,
                                normalize,
                                scale,
                                Simplex::of_dimension(call.d),
                                cuda_dtype(call.z.scalar_type()),
                                stream};
    return backward ? cuda::simplex_logits_backward(args) : cuda::simplex_logits(args);
  });
}

Tensor simplex_logits_cuda(Tensor z, bool normalize, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(z, "z"));
  const LogitsCall call = check(z, nullptr, scale);
  run_cuda(call, false, normalize, scale);
  return call.out;
}

Tensor simplex_logits_backward_cuda(Tensor gradient, Tensor z, bool normalize, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(z, "z"));
  const LogitsCall call = check(z, &gradient, scale);
  run_cuda(call, true, normalize, scale);
  return call.out;
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def("simplex_logits(Tensor z, bool normalize, float scale) -> Tensor");
  m.def("simplex_logits_backward(Tensor gradient, Tensor z, bool normalize, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("simplex_logits", SIMPLEXFIX_OPERATOR(simplex_logits_cpu));
  m.impl("simplex_logits_backward", SIMPLEXFIX_OPERATOR(simplex_logits_backward_cpu));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("simplex_logits", SIMPLEXFIX_OPERATOR(simplex_logits_cuda));
  m.impl("simplex_logits_backward", SIMPLEXFIX_OPERATOR(simplex_logits_backward_cuda));
}
#endif
