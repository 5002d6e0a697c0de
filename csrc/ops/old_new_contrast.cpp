// simplexfix::old_new_contrast: checks, allocation, dispatch. cpu/contrast.h runs it on the CPU. The block loop for a
// GPU is here, since its matrix products are torch's.
#include <algorithm>

#include "../cpu/contrast.h"
#include "buffer_pool.h"
#include "common.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {
// anchors [A, d], candidates [C, d]; candidate first_positive + i is anchor i's own. upstream [A], in the accumulating
// dtype, is the factor of each row's gradient; without it no gradient is computed. The gradient is with respect to the
// anchors if to_anchors, else to the candidates.
struct ContrastCall {
  Tensor anchors, candidates, anchor_class, candidate_class, loss;
  std::optional<Tensor> upstream;
  int64_t rows, count, d, first_positive;
  double mu;
  Negatives negatives;
  bool to_anchors;
  ScalarType type, accumulate;

  const Tensor& side() const { return to_anchors ? anchors : candidates; }  // the side of the gradient
  int64_t anchor_stride() const { return rows > 1 ? anchors.stride(0) : d; }
  int64_t candidate_stride() const { return count > 1 ? candidates.stride(0) : d; }
  int64_t side_stride() const { return to_anchors ? anchor_stride() : candidate_stride(); }
};

ContrastCall check_contrast(const Tensor& anchors, const Tensor& candidates, const Tensor& anchor_class,
                            const Tensor& candidate_class, int64_t first_positive, double mu, int64_t negatives,
                            const std::optional<Tensor>& upstream, bool to_anchors) {
  const std::pair<const Tensor*, const Tensor*> sides[] = {{&anchors, &anchor_class}, {&candidates, &candidate_class}};
  const ScalarType type = anchors.scalar_type();
  for (const auto& [rows, classes] : sides) {
    const char* name = rows == &anchors ? "anchors" : "candidates";
    check_rows(*rows, name);
    SIMPLEXFIX_CHECK(rows->scalar_type() == type && rows->size(1) == anchors.size(1),
                     "anchors and candidates must have the same dtype and number of columns, got ",
                     torch::headeronly::toString(type), " ", shape_of(anchors), " and ",
                     torch::headeronly::toString(rows->scalar_type()), " ", shape_of(*rows));
    SIMPLEXFIX_CHECK(
        classes->dim() == 1 && classes->size(0) == rows->size(0) && classes->scalar_type() == ScalarType::Long, name,
        "' classes must be int64 and have shape [", rows->size(0), "], got ",
        torch::headeronly::toString(classes->scalar_type()), " ", shape_of(*classes));
    SIMPLEXFIX_CHECK(rows->device() == anchors.device() && classes->device() == anchors.device(),
                     "anchors, candidates and their classes must be on the same device");
  }
  const int64_t n = anchors.size(0), count = candidates.size(0);
  SIMPLEXFIX_CHECK(first_positive >= 0 && first_positive + n <= count,
                   "candidates must include one for each anchor from row first_positive on: expected ", n,
                   " rows from row ", first_positive, " on, got ", count, " candidates");
  SIMPLEXFIX_CHECK(negatives >= 0 && negatives <= 2, "negatives must be 0, 1 or 2, got ", negatives);
  SIMPLEXFIX_CHECK(count < (int64_t(1) << 31), "candidates must have at most 2^31 - 1 rows, got ", count);
  if (upstream)
    SIMPLEXFIX_CHECK(upstream->dim() == 1 && upstream->size(0) == n && upstream->scalar_type() == accumulate_type(type),
                     "upstream must be ", torch::headeronly::toString(accumulate_type(type)), " and have shape [", n,
                     "], got ", torch::headeronly::toString(upstream->scalar_type()), " ", shape_of(*upstream));
  ContrastCall call{.anchors = with_dense_rows(anchors),
                    .candidates = with_dense_rows(candidates),
                    .anchor_class = as_contiguous(anchor_class),
                    .candidate_class = as_contiguous(candidate_class),
                    .loss = torch::stable::new_empty(anchors, {n}, accumulate_type(type)),
                    .upstream = {},
                    .rows = n,
                    .count = count,
                    .d = anchors.size(1),
                    .first_positive = first_positive,
                    .mu = mu,
                    .negatives = static_cast<Negatives>(negatives),
                    .to_anchors = to_anchors,
                    .type = type,
                    .accumulate = accumulate_type(type)};
  if (upstream) call.upstream = as_contiguous(*upstream);
  return call;
}

std::tuple<Tensor, Tensor> old_new_contrast_cpu(Tensor anchors, Tensor candidates, Tensor anchor_class,
                                                Tensor candidate_class, int64_t first_positive, double mu,
                                                int64_t negatives, std::optional<Tensor> upstream, bool to_anchors) {
  const ContrastCall call = check_contrast(anchors, candidates, anchor_class, candidate_class, first_positive, mu,
                                           negatives, upstream, to_anchors);
  const std::vector<int64_t> shape =
      upstream ? std::vector<int64_t>{call.side().size(0), call.d} : std::vector<int64_t>{0};
  const Tensor gradient = reusable_empty(shape, call.type);
  const Tensor grad_unit = call.accumulate == call.type ? gradient : reusable_empty(shape, call.accumulate);
  dispatch_floating(call.type, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const auto split = [](int64_t count, int64_t numbers, const auto& work) { for_rows(count, numbers, work); };
    cpu::old_new_contrast(cpu::OldNewContrast<T>{.anchors = data<T>(call.anchors),
                                                 .candidates = data<T>(call.candidates),
                                                 .anchor_stride = call.anchor_stride(),
                                                 .candidate_stride = call.candidate_stride(),
                                                 .anchor_class = data<int64_t>(call.anchor_class),
                                                 .candidate_class = data<int64_t>(call.candidate_class),
                                                 .rows = call.rows,
                                                 .count = call.count,
                                                 .d = call.d,
                                                 .first_positive = call.first_positive,
                                                 .mu = A(call.mu),
                                                 .negatives = call.negatives,
                                                 .loss = mutable_data<A>(call.loss),
                                                 .upstream = call.upstream ? data<A>(*call.upstream) : nullptr,
                                                 .to_anchors = call.to_anchors,
                                                 .grad_unit = mutable_data<A>(grad_unit),
                                                 .gradient = mutable_data<T>(gradient)},
                          split);
  });
  return {call.loss, gradient};
}

#ifdef SIMPLEXFIX_WITH_CUDA
Tensor narrow_rows(Tensor rows, int64_t first, int64_t count) { return torch::stable::narrow(rows, 0, first, count); }

Tensor accumulating(const Tensor& rows) {
  const ScalarType type = accumulate_type(rows.scalar_type());
  return rows.scalar_type() == type ? rows : torch::stable::to(rows, type);
}

constexpr int64_t kCudaBlockNumbers = int64_t(1) << 22;  // 16 MiB of float: stays in L2 (A100: 40 MB, H100: 50 MB)
constexpr int64_t kCudaMinBlock = 128;                   // rows

std::tuple<Tensor, Tensor> old_new_contrast_cuda(Tensor anchors, Tensor candidates, Tensor anchor_class,
                                                 Tensor candidate_class, int64_t first_positive, double mu,
                                                 int64_t negatives, std::optional<Tensor> upstream, bool to_anchors) {
  const int32_t device = cuda_device(anchors, "anchors");
  const torch::stable::accelerator::DeviceGuard guard(device);
  const ContrastCall call = check_contrast(anchors, candidates, anchor_class, candidate_class, first_positive, mu,
                                           negatives, upstream, to_anchors);
  const int64_t n = call.rows, count = call.count, d = call.d;
  const Tensor& side = call.side();
  const cuda::DType dtype = cuda_dtype(call.type);
  const auto norms_of = [&](const Tensor& rows) {
    const Tensor norms = torch::stable::new_empty(rows, {rows.size(0)}, call.accumulate);
    launch(device, "old_new_contrast", [&](void* stream) {
      return cuda::inverse_norms({rows.const_data_ptr(), rows.size(0) > 1 ? rows.stride(0) : d,
                                  norms.mutable_data_ptr(), rows.size(0), d, dtype, stream});
    });
    return norms;
  };
  const Tensor anchor_scale = norms_of(call.anchors), candidate_scale = norms_of(call.candidates);
  const Tensor a = accumulating(call.anchors), c = accumulating(call.candidates);
  const Tensor c_columns = torch::stable::transpose(c, 0, 1);
  const Tensor gradient =
      upstream ? torch::stable::new_empty(side, {side.size(0), d}) : torch::stable::new_empty(side, {0});
  const Tensor grad_unit = !upstream || call.accumulate == call.type
                               ? gradient
                               : torch::stable::new_empty(side, {side.size(0), d}, call.accumulate);
  // Without anchors the candidates' gradient is 0.
  if (upstream && n == 0) torch::stable::zero_(const_cast<Tensor&>(grad_unit));

  const int64_t block = std::max(kCudaBlockNumbers / std::max<int64_t>(1, count), kCudaMinBlock);
  const Tensor similarity = torch::stable::new_empty(a, {std::min(block, n), count});
  const auto at = [&](const Tensor& numbers, int64_t first) { return narrow_rows(numbers, first, n - first); };
  for (int64_t first = 0; first < n; first += block) {
    const int64_t rows = std::min(block, n - first);
    const Tensor a_rows = narrow_rows(a, first, rows), s_rows = narrow_rows(similarity, 0, rows);
    cuda_matrix_product(s_rows, a_rows, c_columns, false);
    launch(device, "old_new_contrast", [&](void* stream) {
      return cuda::contrast_rows(
          {s_rows.mutable_data_ptr(), data<int64_t>(at(call.anchor_class, first)), data<int64_t>(call.candidate_class),
           at(anchor_scale, first).const_data_ptr(), candidate_scale.const_data_ptr(),
           upstream ? at(*call.upstream, first).const_data_ptr() : nullptr, at(call.loss, first).mutable_data_ptr(),
           rows, count, first_positive + first, mu, call.negatives, dtype, stream});
    });
    if (!upstream) continue;
    if (to_anchors)
      cuda_matrix_product(narrow_rows(grad_unit, first, rows), s_rows, c, false);
    else
      cuda_matrix_product(grad_unit, torch::stable::transpose(s_rows, 0, 1), a_rows, first > 0);
  }
  if (!upstream) return {call.loss, gradient};
  launch(device, "old_new_contrast", [&](void* stream) {
    return cuda::project_rows({side.const_data_ptr(), call.side_stride(), grad_unit.const_data_ptr(),
                               (to_anchors ? anchor_scale : candidate_scale).const_data_ptr(),
                               gradient.mutable_data_ptr(), side.size(0), d, dtype, stream});
  });
  return {call.loss, gradient};
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def(
      "old_new_contrast(Tensor anchors, Tensor candidates, Tensor anchor_class, Tensor candidate_class, "
      "int first_positive, float mu, int negatives, Tensor? upstream, bool to_anchors) -> (Tensor loss, Tensor "
      "gradient)");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) { m.impl("old_new_contrast", SIMPLEXFIX_OPERATOR(old_new_contrast_cpu)); }
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("old_new_contrast", SIMPLEXFIX_OPERATOR(old_new_contrast_cuda));
}
#endif
