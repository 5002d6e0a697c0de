// simplexfix::orthoplex_cross_entropy: dispatch; everything else is cross_entropy.h's.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

std::tuple<Tensor, Tensor> orthoplex_cross_entropy_cpu(Tensor z, Tensor target, bool normalize, double scale,
                                                       int64_t margin_kind, double margin_size,
                                                       std::optional<Tensor> weight, int64_t ignore_index,
                                                       double smoothing, int64_t reduction, bool wants_gradient) {
  check_rows(z, "z");
  const CrossEntropyCall call =
      check_cross_entropy(z, target, 2 * z.size(1), normalize, scale, margin_kind, margin_size, weight, ignore_index,
                          smoothing, reduction, wants_gradient);
  cross_entropy_cpu(call, [](const auto& args, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(args)>::Number;
    cpu::kernels<T>().orthoplex_cross_entropy(args, begin, end);
  });
  return {call.loss, call.gradient};
}

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(
      "orthoplex_cross_entropy(Tensor z, Tensor target, bool normalize, float scale, int margin_kind, "
      "float margin_size, Tensor? weight, int ignore_index, float label_smoothing, int reduction, "
      "bool wants_gradient) -> (Tensor loss, Tensor gradient)");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("orthoplex_cross_entropy", TORCH_BOX(&simplexfix::orthoplex_cross_entropy_cpu));
}
