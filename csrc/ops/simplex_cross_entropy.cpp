// simplexfix::simplex_cross_entropy and simplexfix::scale_rows: checks, allocation, dispatch.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

CrossEntropyCall check(const Tensor& z, const Tensor& target, bool normalize, double scale, int64_t margin_kind,
                       double margin_size, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
                       int64_t reduction, bool wants_gradient, ScalarType loss_dtype) {
  check_rows(z, "z");
  return check_cross_entropy(z, target, z.size(1) + 1, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                             smoothing, reduction, wants_gradient, loss_dtype);
}

std::tuple<Tensor, Tensor> simplex_cross_entropy_cpu(Tensor z, Tensor target, bool normalize, double scale,
                                                     int64_t margin_kind, double margin_size,
                                                     std::optional<Tensor> weight, int64_t ignore_index,
                                                     double smoothing, int64_t reduction, bool wants_gradient,
                                                     ScalarType loss_dtype) {
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient, loss_dtype);
  cross_entropy_cpu(call, [](const auto& args, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(args)>::Number;
    cpu::kernels<T>().simplex_cross_entropy(args, begin, end);
  });
  return {call.loss, call.gradient};
}

// gradient [B, d] times upstream: one number, or one per row
struct ScaleCall {
  Tensor gradient, factor, out;
  int64_t rows, cols, factor_stride;
};

ScaleCall check_scale(const Tensor& gradient, const Tensor& upstream) {
  check_rows(gradient, "gradient");
  const bool one = upstream.dim() == 0;
  SIMPLEXFIX_CHECK(one || (upstream.dim() == 1 && upstream.size(0) == gradient.size(0)),
                   "upstream must be a scalar or have shape [", gradient.size(0), "]");
  SIMPLEXFIX_CHECK(upstream.scalar_type() == accumulate_type(gradient.scalar_type()), "upstream must be ",
                   torch::headeronly::toString(accumulate_type(gradient.scalar_type())), ", got ",
                   torch::headeronly::toString(upstream.scalar_type()));
  SIMPLEXFIX_CHECK(upstream.device() == gradient.device(), "upstream and gradient are on different devices");
  return {as_contiguous(gradient),
          as_contiguous(upstream),
          torch::stable::new_empty(gradient, {gradient.size(0), gradient.size(1)}),
          gradient.size(0),
          gradient.size(1),
          one ? 0 : 1};
}

Tensor scale_rows_cpu(Tensor gradient, Tensor upstream) {
  const ScaleCall call = check_scale(gradient, upstream);
  dispatch_floating(gradient.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    const T* in = data<T>(call.gradient);
    const auto* factor = data<accumulate_t<T>>(call.factor);
    T* out = mutable_data<T>(call.out);
    const auto rows = cpu::kernels<T>().scale_rows;
    for_rows(call.rows, call.cols,
             [&](int64_t begin, int64_t end) { rows(in, factor, call.factor_stride, out, call.cols, begin, end); });
  });
  return call.out;
}

#ifdef SIMPLEXFIX_WITH_CUDA
std::tuple<Tensor, Tensor> simplex_cross_entropy_cuda(Tensor z, Tensor target, bool normalize, double scale,
                                                      int64_t margin_kind, double margin_size,
                                                      std::optional<Tensor> weight, int64_t ignore_index,
                                                      double smoothing, int64_t reduction, bool wants_gradient,
                                                      ScalarType loss_dtype) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(z, "z"));
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient, loss_dtype);
  cross_entropy_cuda(call, "simplex_cross_entropy", cuda::simplex_cross_entropy);
  return {call.loss, call.gradient};
}

Tensor scale_rows_cuda(Tensor gradient, Tensor upstream) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(gradient, "gradient"));
  const ScaleCall call = check_scale(gradient, upstream);
  launch(gradient.get_device_index(), "scale_rows", [&](void* stream) {
    return cuda::scale_rows({call.gradient.const_data_ptr(), call.factor.const_data_ptr(), call.factor_stride,
                             call.out.mutable_data_ptr(), call.rows, call.cols, cuda_dtype(gradient.scalar_type()),
                             stream});
  });
  return call.out;
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(
      "simplex_cross_entropy(Tensor z, Tensor target, bool normalize, float scale, int margin_kind, "
      "float margin_size, Tensor? weight, int ignore_index, float label_smoothing, int reduction, "
      "bool wants_gradient, ScalarType loss_dtype) -> (Tensor loss, Tensor gradient)");
  m.def("scale_rows(Tensor gradient, Tensor upstream) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("simplex_cross_entropy", SIMPLEXFIX_OPERATOR(simplex_cross_entropy_cpu));
  m.impl("scale_rows", SIMPLEXFIX_OPERATOR(scale_rows_cpu));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("simplex_cross_entropy", SIMPLEXFIX_OPERATOR(simplex_cross_entropy_cuda));
  m.impl("scale_rows", SIMPLEXFIX_OPERATOR(scale_rows_cuda));
}
#endif
