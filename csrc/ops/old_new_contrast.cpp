// simplexfix::old_new_contrast: block after block of anchors, two matrix products (cpu/matrix_product.h, on a GPU
// torch's) and the kernel of cpu/contrast.inc or cuda/contrast.cuh between them.
//
// Features are not normalised beforehand: norms enter as factors of rows and columns, so that beside the results the
// only memory is one block of similarities, kBlockNumbers, with the products' chunks or, on a GPU, 16-bit features'
// copies in float.
#include <algorithm>

#include "../cpu/kernels.h"
#include "../cpu/matrix_product.h"
#include "buffer_pool.h"
#include "common.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {
constexpr int64_t kBlockNumbers = int64_t(1) << 22;
constexpr int64_t kMinBlock = 32, kMaxBlock = 512;  // rows: below, the products are slow; above, no faster

template <typename I>
std::vector<I> numbers_of(const int64_t* ids, int64_t n, const std::vector<int64_t>& sorted) {
  std::vector<I> numbers(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const auto found = std::lower_bound(sorted.begin(), sorted.end(), ids[i]);
    // an anchor's class that no candidate has gets a number of its own: all differ
    numbers[size_t(i)] = found != sorted.end() && *found == ids[i] ? I(found - sorted.begin()) : I(-1);
  }
  return numbers;
}

template <typename T, typename A>
std::vector<A> norms_of(const Tensor& rows) {
  const int64_t n = rows.size(0), d = rows.size(1), stride = n > 1 ? rows.stride(0) : d;
  std::vector<A> out(static_cast<size_t>(n));
  for_rows(n, d, [&](int64_t begin, int64_t end) {
    cpu::kernels<T>().inverse_norms(data<T>(rows), stride, d, out.data(), begin, end);
  });
  return out;
}

// anchors [A, d], candidates [C, d]; anchor i's own candidate is first_positive + i.  upstream [A] in the
// accumulating dtype: what each row's gradient is multiplied by; without it there is none.  The gradient is
// that of the candidates, or of the anchors.
struct ContrastCall {
  Tensor anchors, candidates, anchor_class, candidate_class, loss;
  std::optional<Tensor> upstream;
  int64_t rows, count, d, first_positive;
  double mu;
  Negatives negatives;
  bool to_anchors;
  ScalarType type, accumulate;

  const Tensor& side() const { return to_anchors ? anchors : candidates; }  // whose gradient it is
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
                     "anchors and candidates must have the same dtype and number of columns");
    SIMPLEXFIX_CHECK(
        classes->dim() == 1 && classes->size(0) == rows->size(0) && classes->scalar_type() == ScalarType::Long, name,
        "' classes must be int64 and have shape [", rows->size(0), "]");
    SIMPLEXFIX_CHECK(rows->device() == anchors.device() && classes->device() == anchors.device(),
                     "anchors, candidates and their classes are on different devices");
  }
  const int64_t n = anchors.size(0), count = candidates.size(0);
  SIMPLEXFIX_CHECK(first_positive >= 0 && first_positive + n <= count, "anchors ", first_positive, " to ",
                   first_positive + n - 1, " have no candidates of their own among ", count);
  SIMPLEXFIX_CHECK(negatives >= 0 && negatives <= 2, "negatives must be 0, 1 or 2, got ", negatives);
  SIMPLEXFIX_CHECK(count < (int64_t(1) << 31), "at most 2^31 - 1 candidates, got ", count);
  if (upstream)
    SIMPLEXFIX_CHECK(upstream->dim() == 1 && upstream->size(0) == n && upstream->scalar_type() == accumulate_type(type),
                     "upstream must have shape [", n, "] in the accumulating dtype");
  ContrastCall call{with_dense_rows(anchors),
                    with_dense_rows(candidates),
                    as_contiguous(anchor_class),
                    as_contiguous(candidate_class),
                    torch::stable::new_empty(anchors, {n}, accumulate_type(type)),
                    {},
                    n,
                    count,
                    anchors.size(1),
                    first_positive,
                    mu,
                    static_cast<Negatives>(negatives),
                    to_anchors,
                    type,
                    accumulate_type(type)};
  if (upstream) call.upstream = as_contiguous(*upstream);
  return call;
}

std::tuple<Tensor, Tensor> old_new_contrast_cpu(Tensor anchors, Tensor candidates, Tensor anchor_class,
                                                Tensor candidate_class, int64_t first_positive, double mu,
                                                int64_t negatives, std::optional<Tensor> upstream, bool to_anchors) {
  const ContrastCall call = check_contrast(anchors, candidates, anchor_class, candidate_class, first_positive, mu,
                                           negatives, upstream, to_anchors);
  const int64_t n = call.rows, count = call.count, d = call.d;
  const Tensor& side = call.side();
  const Tensor gradient = upstream ? reusable_empty({side.size(0), d}, call.type) : torch::stable::new_empty(side, {0});
  dispatch_floating(call.type, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    std::vector<int64_t> sorted(data<int64_t>(call.candidate_class), data<int64_t>(call.candidate_class) + count);
    std::sort(sorted.begin(), sorted.end());
    sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
    const auto anchor_numbers = numbers_of<cpu::ClassIndex<A>>(data<int64_t>(call.anchor_class), n, sorted);
    const auto candidate_numbers = numbers_of<cpu::ClassIndex<A>>(data<int64_t>(call.candidate_class), count, sorted);
    const auto anchor_scale = norms_of<T, A>(call.anchors), candidate_scale = norms_of<T, A>(call.candidates);
    const T *a = data<T>(call.anchors), *c = data<T>(call.candidates);
    const int64_t a_stride = call.anchor_stride(), c_stride = call.candidate_stride();
    // what flows into the normalised features, before the projection; in place where the types agree
    const Tensor flow =
        !upstream || call.accumulate == call.type ? gradient : reusable_empty({side.size(0), d}, call.accumulate);
    if (upstream && n == 0) std::fill_n(mutable_data<A>(flow), flow.numel(), A(0));  // candidates without anchors

    const int64_t block = std::clamp(kBlockNumbers / std::max<int64_t>(1, count), kMinBlock, kMaxBlock);
    const Tensor similarity = torch::stable::new_empty(call.loss, {std::min(block, n), count});
    A* s = mutable_data<A>(similarity);
    cpu::MatrixProduct<A> product;
    const auto split = [](int64_t rows, int64_t cols, const auto& work) { for_rows(rows, cols, work); };
    for (int64_t first = 0; first < n; first += block) {
      const int64_t rows = std::min(block, n - first);
      const T* a_rows = a + first * a_stride;
      product(rows, count, d, cpu::Lines<T>{a_rows, a_stride, 1}, cpu::Lines<T>{c, c_stride, 1}, s, count, false,
              split);
      const cpu::ContrastArgs<A> args{s,
                                      count,
                                      anchor_numbers.data() + first,
                                      candidate_numbers.data(),
                                      anchor_scale.data() + first,
                                      candidate_scale.data(),
                                      A(mu),
                                      call.negatives,
                                      first_positive + first,
                                      mutable_data<A>(call.loss) + first,
                                      upstream ? data<A>(*call.upstream) + first : nullptr};
      for_rows(rows, count, [&](int64_t begin, int64_t end) { cpu::kernels<T>().contrast_rows(args, begin, end); });
      if (!upstream) continue;
      A* g = mutable_data<A>(flow);
      if (to_anchors)
        product(rows, d, count, cpu::Lines<A>{s, count, 1}, cpu::Lines<T>{c, 1, c_stride}, g + first * d, d, false,
                split);
      else
        product(count, d, rows, cpu::Lines<A>{s, 1, count}, cpu::Lines<T>{a_rows, 1, a_stride}, g, d, first > 0, split);
    }
    if (!upstream) return;
    const auto& scale = to_anchors ? anchor_scale : candidate_scale;
    for_rows(side.size(0), d, [&](int64_t begin, int64_t end) {
      cpu::kernels<T>().project_rows(data<T>(side), call.side_stride(), data<A>(flow), scale.data(), d,
                                     mutable_data<T>(gradient), begin, end);
    });
  });
  return {call.loss, gradient};
}

#ifdef SIMPLEXFIX_WITH_CUDA
Tensor narrow_rows(Tensor rows, int64_t first, int64_t count) { return torch::stable::narrow(rows, 0, first, count); }

Tensor accumulating(const Tensor& rows) {
  const ScalarType type = accumulate_type(rows.scalar_type());
  return rows.scalar_type() == type ? rows : torch::stable::to(rows, type);
}

constexpr int64_t kCudaBlockNumbers = int64_t(1) << 22;  // 16 MiB of float: stays in L2 (A100 40, H100 50 MiB)
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
  const Tensor flow = !upstream || call.accumulate == call.type
                          ? gradient
                          : torch::stable::new_empty(side, {side.size(0), d}, call.accumulate);
  if (upstream && n == 0) torch::stable::zero_(const_cast<Tensor&>(flow));  // candidates without anchors

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
      cuda_matrix_product(narrow_rows(flow, first, rows), s_rows, c, false);
    else
      cuda_matrix_product(flow, torch::stable::transpose(s_rows, 0, 1), a_rows, first > 0);
  }
  if (!upstream) return {call.loss, gradient};
  launch(device, "old_new_contrast", [&](void* stream) {
    return cuda::project_rows({side.const_data_ptr(), call.side_stride(), flow.const_data_ptr(),
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
