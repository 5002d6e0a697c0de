// simplexfix::simplex_cross_entropy: K = d + 1 slots.
#include "cross_entropy.h"

namespace simplexfix {
namespace {

struct SimplexLoss {
  static constexpr const char* kOperator = "simplex_cross_entropy";
  const int64_t slots;

  explicit SimplexLoss(const Tensor& z) : slots(z.size(1) + 1) {}

  void check(const CrossEntropyCall&) const {}
  template <typename T>
  void rows(const cpu::CrossEntropyArgs<T>& args, int64_t begin, int64_t end) const {
    cpu::kernels<T>().simplex_cross_entropy(args, begin, end);
  }
#ifdef SIMPLEXFIX_WITH_CUDA
  const char* launch(const cuda::CrossEntropyArgs& args) const { return cuda::simplex_cross_entropy(args); }
#endif
};

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(simplexfix::cross_entropy_schema(simplexfix::SimplexLoss::kOperator).c_str());
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("simplex_cross_entropy", SIMPLEXFIX_OPERATOR(cross_entropy<simplexfix::OnCpu, simplexfix::SimplexLoss>));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("simplex_cross_entropy", SIMPLEXFIX_OPERATOR(cross_entropy<simplexfix::OnCuda, simplexfix::SimplexLoss>));
}
#endif
