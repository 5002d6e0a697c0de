// simplexfix::scale_rows: multiplies a stored gradient by the upstream gradient, and divides it if the operator of the
// loss left that to the backward pass.
#include "common.h"

#include "../core/cross_entropy.h"
#include "../cpu/kernels.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {

struct ScaleCall {
  Tensor gradient, factor, out;   // [rows, cols]; one factor, or one per row
  std::optional<Tensor> divisor;  // a scalar
  int64_t rows, cols, factor_stride;
};

ScaleCall check(const Tensor& gradient, const Tensor& upstream, const std::optional<Tensor>& divisor) {
  check_rows(gradient, "gradient");
  const bool one = upstream.dim() == 0;
  SIMPLEXFIX_CHECK(one || (upstream.dim() == 1 && upstream.size(0) == gradient.size(0)),
                   "upstream must be a scalar or have shape [", gradient.size(0), "], got ", shape_of(upstream));
  SIMPLEXFIX_CHECK(upstream.scalar_type() == accumulate_type(gradient.scalar_type()), "upstream must be ",
                   torch::headeronly::toString(accumulate_type(gradient.scalar_type())), ", got ",
                   torch::headeronly::toString(upstream.scalar_type()));
  SIMPLEXFIX_CHECK(upstream.device() == gradient.device(), "upstream and gradient must be on the same device");
  if (divisor) {
    SIMPLEXFIX_CHECK(one, "with a divisor upstream must be a scalar, got ", shape_of(upstream));
    SIMPLEXFIX_CHECK(divisor->dim() == 0 && divisor->scalar_type() == upstream.scalar_type(),
                     "divisor must be a scalar of ", torch::headeronly::toString(upstream.scalar_type()), ", got ",
                     shape_of(*divisor), " of ", torch::headeronly::toString(divisor->scalar_type()));
    SIMPLEXFIX_CHECK(divisor->device() == gradient.device(), "divisor and gradient must be on the same device");
  }
  return {.gradient = as_contiguous(gradient),
          .factor = as_contiguous(upstream),
          .out = torch::stable::new_empty(gradient, {gradient.size(0), gradient.size(1)}),
          .divisor = divisor,
          .rows = gradient.size(0),
          .cols = gradient.size(1),
          .factor_stride = one ? 0 : 1};
}

Tensor scale_rows_cpu(Tensor gradient, Tensor upstream, std::optional<Tensor> divisor) {
  const ScaleCall call = check(gradient, upstream, divisor);
  dispatch_floating(gradient.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(call.gradient);
    const auto* factor = data<accumulate_t<T>>(call.factor);
    accumulate_t<T> divided;
    if (call.divisor) {
      divided = divide_upstream(*factor, *data<accumulate_t<T>>(*call.divisor));
      factor = &divided;
    }
    T* out = mutable_data<T>(call.out);
    const auto rows = cpu::kernels<T>().scale_rows;
    for_rows(call.rows, call.cols,
             [&](int64_t begin, int64_t end) { rows(in, factor, call.factor_stride, out, call.cols, begin, end); });
  });
  return call.out;
}

#ifdef SIMPLEXFIX_WITH_CUDA
Tensor scale_rows_cuda(Tensor gradient, Tensor upstream, std::optional<Tensor> divisor) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(gradient, "gradient"));
  const ScaleCall call = check(gradient, upstream, divisor);
  launch(gradient.get_device_index(), "scale_rows", [&](void* stream) {
    return cuda::scale_rows({call.gradient.const_data_ptr(), call.factor.const_data_ptr(), call.factor_stride,
                             call.divisor ? call.divisor->const_data_ptr() : nullptr, call.out.mutable_data_ptr(),
                             call.rows, call.cols, cuda_dtype(gradient.scalar_type()), stream});
  });
  return call.out;
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def("scale_rows(Tensor gradient, Tensor upstream, Tensor? divisor=None) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) { m.impl("scale_rows", SIMPLEXFIX_OPERATOR(scale_rows_cpu)); }
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) { m.impl("scale_rows", SIMPLEXFIX_OPERATOR(scale_rows_cuda)); }
#endif
