// simplexfix::cube_cross_entropy: checks of the codes, dispatch; everything else is cross_entropy.h's.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

// codes: made contiguous where they are not.
CrossEntropyCall check(const Tensor& z, const Tensor& target, std::optional<Tensor>* codes, bool normalize,
                       double scale, int64_t margin_kind, double margin_size, const std::optional<Tensor>& weight,
                       int64_t ignore_index, double smoothing, int64_t reduction, bool wants_gradient,
                       ScalarType loss_dtype) {
  check_rows(z, "z");
  const int64_t d = z.size(1), words = (d + 63) / 64;
  if (*codes) {
    SIMPLEXFIX_CHECK((*codes)->dim() == 2 && (*codes)->size(1) == words, "codes must have shape [C, ", words,
                     "] for features of ", d, " columns");
    SIMPLEXFIX_CHECK((*codes)->scalar_type() == ScalarType::Long, "codes must be int64, got ",
                     torch::headeronly::toString((*codes)->scalar_type()));
    SIMPLEXFIX_CHECK((*codes)->device() == z.device(), "codes and z are on different devices");
    *codes = as_contiguous(**codes);
  } else {
    SIMPLEXFIX_CHECK(d <= 62, "without codes z must have at most 62 columns, got ", d);
  }
  SIMPLEXFIX_CHECK(!weight || smoothing == 0, "weight and label_smoothing exclude each other");
  return check_cross_entropy(z, target, *codes ? (*codes)->size(0) : int64_t(1) << d, normalize, scale, margin_kind,
                             margin_size, weight, ignore_index, smoothing, reduction, wants_gradient, loss_dtype);
}

std::tuple<Tensor, Tensor> cube_cross_entropy_cpu(Tensor z, Tensor target, std::optional<Tensor> codes, bool normalize,
                                                  double scale, int64_t margin_kind, double margin_size,
                                                  std::optional<Tensor> weight, int64_t ignore_index, double smoothing,
                                                  int64_t reduction, bool wants_gradient, ScalarType loss_dtype) {
  const CrossEntropyCall call = check(z, target, &codes, normalize, scale, margin_kind, margin_size, weight,
                                      ignore_index, smoothing, reduction, wants_gradient, loss_dtype);
  const int64_t d = call.d, words = (d + 63) / 64, slots = call.slots;
  if (codes && d % 64 != 0) {  // of the rows that are wanted: to look at all of them would cost more than the loss
    const int64_t *labels = data<int64_t>(call.target), *table = data<int64_t>(*codes);
    for (int64_t b = 0; b < call.rows; ++b) {
      const int64_t label = labels[b];
      if (label == ignore_index || label < 0 || label >= slots) continue;
      SIMPLEXFIX_CHECK(table[label * words + words - 1] >> (d % 64) == 0, "codes row ", label,
                       " has bits beyond d = ", d, ": they were made for another d");
    }
  }
  cross_entropy_cpu(call, [&](const auto& args, int64_t begin, int64_t end) {
    using T = typename std::decay_t<decltype(args)>::Number;
    const int64_t* table = codes ? data<int64_t>(*codes) : nullptr;
    cpu::kernels<T>().cube_cross_entropy({args, table, words}, begin, end);
  });
  return {call.loss, call.gradient};
}

#ifdef SIMPLEXFIX_WITH_CUDA
std::tuple<Tensor, Tensor> cube_cross_entropy_cuda(Tensor z, Tensor target, std::optional<Tensor> codes, bool normalize,
                                                   double scale, int64_t margin_kind, double margin_size,
                                                   std::optional<Tensor> weight, int64_t ignore_index, double smoothing,
                                                   int64_t reduction, bool wants_gradient, ScalarType loss_dtype) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(z, "z"));
  const CrossEntropyCall call = check(z, target, &codes, normalize, scale, margin_kind, margin_size, weight,
                                      ignore_index, smoothing, reduction, wants_gradient, loss_dtype);
  cross_entropy_cuda(call, "cube_cross_entropy", [&](const cuda::CrossEntropyArgs& args) {
    return cuda::cube_cross_entropy(args, codes ? data<int64_t>(*codes) : nullptr);
  });
  return {call.loss, call.gradient};
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(
      "cube_cross_entropy(Tensor z, Tensor target, Tensor? codes, bool normalize, float scale, int margin_kind, "
      "float margin_size, Tensor? weight, int ignore_index, float label_smoothing, int reduction, "
      "bool wants_gradient, ScalarType loss_dtype) -> (Tensor loss, Tensor gradient)");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("cube_cross_entropy", SIMPLEXFIX_OPERATOR(cube_cross_entropy_cpu));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("cube_cross_entropy", SIMPLEXFIX_OPERATOR(cube_cross_entropy_cuda));
}
#endif
