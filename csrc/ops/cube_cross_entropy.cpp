// simplexfix::cube_cross_entropy: K = 2^d slots, or one slot per row of codes.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

struct CubeLoss {
  static constexpr const char* kOperator = "cube_cross_entropy";
  const std::optional<Tensor> codes;  // [K, words] contiguous; if empty, the target itself is the code
  const int64_t words, slots;

  CubeLoss(const Tensor& z, const std::optional<Tensor>& given)
      : codes(given ? std::optional(as_contiguous(*given)) : std::nullopt),
        words((z.size(1) + 63) / 64),
        slots(number_of_slots(z)) {}

  void check(const CrossEntropyCall& call) const {
    SIMPLEXFIX_CHECK(!call.weight || call.smoothing == 0,
                     "weight and label_smoothing exclude each other: drop one of them");
    if (!codes || call.d % 64 == 0 || !call.z.is_cpu()) return;
    // Check only the rows in use: checking the whole table would cost more than the loss.
    const int64_t *labels = data<int64_t>(call.target), *table = data<int64_t>(*codes);
    for (int64_t b = 0; b < call.rows; ++b) {
      const int64_t label = labels[b];
      if (label == call.ignore_index || label < 0 || label >= slots) continue;
      SIMPLEXFIX_CHECK(table[label * words + words - 1] >> (call.d % 64) == 0, "row ", label,
                       " of codes has bits beyond d = ", call.d, ": make the codes with cube_codes(num_classes, ",
                       call.d, ")");
    }
  }
  template <typename T>
  void rows(const cpu::CrossEntropyArgs<T>& args, int64_t begin, int64_t end) const {
    cpu::kernels<T>().cube_cross_entropy({args, code_table(), words}, begin, end);
  }
#ifdef SIMPLEXFIX_WITH_CUDA
  const char* launch(const cuda::CrossEntropyArgs& args) const { return cuda::cube_cross_entropy(args, code_table()); }
#endif

 private:
  const int64_t* code_table() const { return codes ? data<int64_t>(*codes) : nullptr; }

  int64_t number_of_slots(const Tensor& z) const {
    const int64_t d = z.size(1);
    if (!codes) {
      SIMPLEXFIX_CHECK(d <= 62, "z must have at most 62 columns without codes, got ", d, ": pass codes");
      return int64_t(1) << d;
    }
    SIMPLEXFIX_CHECK(codes->dim() == 2 && codes->size(1) == words, "codes must have shape [C, ", words, "] for d = ", d,
                     ", got ", shape_of(*codes));
    SIMPLEXFIX_CHECK(codes->scalar_type() == ScalarType::Long, "codes must be int64, got ",
                     torch::headeronly::toString(codes->scalar_type()));
    SIMPLEXFIX_CHECK(codes->device() == z.device(), "codes and z must be on the same device");
    return codes->size(0);
  }
};

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(simplexfix::cross_entropy_schema(simplexfix::CubeLoss::kOperator, "Tensor? codes, ").c_str());
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl(
      "cube_cross_entropy",
      SIMPLEXFIX_OPERATOR(cross_entropy<simplexfix::OnCpu, simplexfix::CubeLoss, std::optional<simplexfix::Tensor>>));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl(
      "cube_cross_entropy",
      SIMPLEXFIX_OPERATOR(cross_entropy<simplexfix::OnCuda, simplexfix::CubeLoss, std::optional<simplexfix::Tensor>>));
}
#endif
