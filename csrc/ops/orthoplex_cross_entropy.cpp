// simplexfix::orthoplex_cross_entropy: dispatch; everything else is cross_entropy.h's.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

CrossEntropyCall check(const Tensor& z, const Tensor& target, bool normalize, double scale, int64_t margin_kind,
                       double margin_size, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
                       int64_t reduction, bool wants_gradient, ScalarType loss_dtype) {
  check_rows(z, "z");
  return check_cross_entropy(z, target, 2 * z.size(1), normalize, scale, margin_kind, margin_size, weight, ignore_index,
                             smoothing, reduction, wants_gradient, loss_dtype);
}

std::tuple<Tensor, Tensor> orthoplex_cross_entropy_cpu(Tensor z, Tensor target, bool normalize, double scale,
                                                       int64_t margin_kind, double margin_size,
                                                       std::optional<Tensor> weight, int64_t ignore_index,
                                                       double smoothing, int64_t reduction, bool wants_gradient,
                                                       ScalarType loss_dtype) {
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient, loss_dtype);
  cross_entropy_cpu(call, [](const auto& args, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(args)>::Number;
    cpu::kernels<T>().orthoplex_cross_entropy(args, begin, end);
  });
  return {call.loss, call.gradient};
}

#ifdef SIMPLEXFIX_WITH_CUDA
std::tuple<Tensor, Tensor> orthoplex_cross_entropy_cuda(Tensor z, Tensor target, bool normalize, double scale,
                                                        int64_t margin_kind, double margin_size,
                                                        std::optional<Tensor> weight, int64_t ignore_index,
                                                        double smoothing, int64_t reduction, bool wants_gradient,
                                                        ScalarType loss_dtype) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(z, "z"));
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient, loss_dtype);
  cross_entropy_cuda(call, "orthoplex_cross_entropy", cuda::orthoplex_cross_entropy);
  return {call.loss, call.gradient};
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(
      "orthoplex_cross_entropy(Tensor z, Tensor target, bool normalize, float scale, int margin_kind, "
      "float margin_size, Tensor? weight, int ignore_index, float label_smoothing, int reduction, "
      "bool wants_gradient, ScalarType loss_dtype) -> (Tensor loss, Tensor gradient)");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("orthoplex_cross_entropy", SIMPLEXFIX_OPERATOR(orthoplex_cross_entropy_cpu));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("orthoplex_cross_entropy", SIMPLEXFIX_OPERATOR(orthoplex_cross_entropy_cuda));
}
#endif
