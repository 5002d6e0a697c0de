// simplexfix::simplex_cross_entropy and simplexfix::scale_rows: checks, allocation, dispatch.
#include "buffer_pool.h"
#include "common.h"

#include <limits>

#include "../core/cross_entropy.h"
#include "../cpu/kernels.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {

// A gradient of this size or more would drive everything else out of the caches before it is read again.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// The operator's arguments, checked; and its results, allocated.
struct CrossEntropyCall {
  Tensor z, target, loss, gradient;
  std::optional<Tensor> weight;  // in the accumulating dtype
  int64_t rows, d;
  bool normalize, wants_gradient;
  double scale, margin_size, smoothing;
  int64_t ignore_index;
  Margin margin;
  Reduction reduction;

  template <typename A>
  CrossEntropyOptions<A> options(A weight_sum) const {
    return {normalize, A(scale), margin, A(margin_size), A(smoothing), weight_sum};
  }
};

CrossEntropyCall check(const Tensor& z, const Tensor& target, bool normalize, double scale, int64_t margin_kind,
                       double margin_size, const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
                       int64_t reduction, bool wants_gradient) {
  check_rows(z, "z");
  const int64_t rows = z.size(0), d = z.size(1);
  const ScalarType type = z.scalar_type(), accumulate = accumulate_type(type);
  SIMPLEXFIX_CHECK(target.dim() == 1 && target.size(0) == rows, "target must have shape [", rows, "], got ",
                   target.dim(), " dimensions, ", target.numel(), " elements");
  SIMPLEXFIX_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, got ",
                   torch::headeronly::toString(target.scalar_type()));
  SIMPLEXFIX_CHECK(target.device() == z.device(), "target and z are on different devices");
  SIMPLEXFIX_CHECK(scale > 0 && scale <= std::numeric_limits<double>::max(), "scale must be positive and finite, got ",
                   scale);
  SIMPLEXFIX_CHECK(margin_kind >= 0 && margin_kind <= 2, "margin_kind must be 0, 1 or 2, got ", margin_kind);
  SIMPLEXFIX_CHECK(margin_kind == 0 || normalize, "a margin needs normalize");
  SIMPLEXFIX_CHECK(smoothing >= 0 && smoothing <= 1, "label_smoothing must lie in [0, 1], got ", smoothing);
  SIMPLEXFIX_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0, 1 or 2, got ", reduction);
  if (weight) {
    SIMPLEXFIX_CHECK(weight->dim() == 1 && weight->size(0) == d + 1, "weight must have shape [", d + 1, "], got ",
                     weight->dim(), " dimensions, ", weight->numel(), " elements");
    SIMPLEXFIX_CHECK(weight->scalar_type() == accumulate, "weight must be ", torch::headeronly::toString(accumulate),
                     ", got ", torch::headeronly::toString(weight->scalar_type()));
    SIMPLEXFIX_CHECK(weight->device() == z.device(), "weight and z are on different devices");
  }
  CrossEntropyCall call{with_dense_rows(z),
                        torch::stable::contiguous(target),
                        {},
                        {},
                        {},
                        rows,
                        d,
                        normalize,
                        wants_gradient,
                        scale,
                        margin_size,
                        smoothing,
                        ignore_index,
                        static_cast<Margin>(margin_kind),
                        static_cast<Reduction>(reduction)};
  if (weight) call.weight = torch::stable::contiguous(*weight);
  const std::vector<int64_t> gradient_shape = wants_gradient ? std::vector<int64_t>{rows, d} : std::vector<int64_t>{0};
  const std::vector<int64_t> loss_shape =
      call.reduction == Reduction::kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{};
  call.gradient = wants_gradient && z.is_cpu() ? reusable_empty(gradient_shape, type)
                                               : torch::stable::new_empty(call.z, gradient_shape);
  call.loss = torch::stable::new_empty(call.z, loss_shape, accumulate);
  return call;
}

// The sum of the class weights of all rows that count: what a mean divides by.
template <typename A>
double weigh_targets(const int64_t* target, int64_t rows, const A* weight, int64_t slots, int64_t ignore_index) {
  double sum = 0;
  for (int64_t b = 0; b < rows; ++b) {
    if (target[b] == ignore_index) continue;
    SIMPLEXFIX_CHECK(target[b] >= 0 && target[b] < slots, "target out of range: row ", b, " has slot ", target[b],
                     ", expected 0 to ", slots - 1, " or ignore_index ", ignore_index);
    sum += weight ? double(weight[target[b]]) : 1.0;
  }
  return sum;
}

std::tuple<Tensor, Tensor> simplex_cross_entropy_cpu(Tensor z, Tensor target, bool normalize, double scale,
                                                     int64_t margin_kind, double margin_size,
                                                     std::optional<Tensor> weight, int64_t ignore_index,
                                                     double smoothing, int64_t reduction, bool wants_gradient) {
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient);
  dispatch_floating(z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const int64_t slots = call.d + 1;
    const int64_t* targets = data<int64_t>(call.target);
    const A* weights = call.weight ? data<A>(*call.weight) : nullptr;
    const double counted = weigh_targets(targets, call.rows, weights, slots, ignore_index);
    double weight_sum = double(slots);
    if (weights && smoothing > 0) {
      weight_sum = 0;
      for (int64_t c = 0; c < slots; ++c) weight_sum += double(weights[c]);
    }
    const bool whole = call.reduction == Reduction::kNone;
    const Tensor row_loss =
        whole ? call.loss : torch::stable::new_empty(call.z, {call.rows}, accumulate_type(z.scalar_type()));
    const double mean = call.reduction == Reduction::kMean ? 1.0 / counted : 1.0;
    cpu::CrossEntropyArgs<T> args{data<T>(call.z),
                                  call.rows > 1 ? call.z.stride(0) : call.d,
                                  targets,
                                  weights,
                                  mutable_data<A>(row_loss),
                                  wants_gradient ? mutable_data<T>(call.gradient) : nullptr,
                                  call.d,
                                  ignore_index,
                                  call.rows * call.d * int64_t(sizeof(T)) >= kStreamBytes,
                                  A(mean),
                                  Simplex::of_dimension(call.d),
                                  call.options<A>(A(weight_sum))};
    const auto rows = cpu::kernels<T>().simplex_cross_entropy;
    torch::stable::parallel_for(0, call.rows, rows_per_task(call.d),
                                [&](int64_t begin, int64_t end) { rows(args, begin, end); });
    if (whole) return;
    double sum = 0;  // in row order, whatever thread did which rows
    for (int64_t b = 0; b < call.rows; ++b) sum += double(args.loss[b]);
    // a mean over nothing is nan, as in torch
    *mutable_data<A>(call.loss) = A(call.reduction == Reduction::kMean ? sum / counted : sum);
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
  return {torch::stable::contiguous(gradient),
          torch::stable::contiguous(upstream),
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
    torch::stable::parallel_for(0, call.rows, rows_per_task(call.cols), [&](int64_t begin, int64_t end) {
      rows(in, factor, call.factor_stride, out, call.cols, begin, end);
    });
  });
  return call.out;
}

#ifdef SIMPLEXFIX_WITH_CUDA
std::tuple<Tensor, Tensor> simplex_cross_entropy_cuda(Tensor z, Tensor target, bool normalize, double scale,
                                                      int64_t margin_kind, double margin_size,
                                                      std::optional<Tensor> weight, int64_t ignore_index,
                                                      double smoothing, int64_t reduction, bool wants_gradient) {
  const torch::stable::accelerator::DeviceGuard guard(z.get_device_index());
  const CrossEntropyCall call = check(z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index,
                                      smoothing, reduction, wants_gradient);
  const ScalarType accumulate = accumulate_type(z.scalar_type());
  const Tensor row_loss =
      call.reduction == Reduction::kNone ? call.loss : torch::stable::new_empty(call.z, {call.rows}, accumulate);
  // [0] the counted weight of the targets, [1] the sum of the class weights: both found on the device
  const Tensor sums = torch::stable::new_empty(call.z, {2}, ScalarType::Double);
  launch(z.get_device_index(), "simplex_cross_entropy", [&](void* stream) {
    return cuda::simplex_cross_entropy(
        {call.z.const_data_ptr(), call.rows > 1 ? call.z.stride(0) : call.d, data<int64_t>(call.target),
         call.weight ? call.weight->const_data_ptr() : nullptr, row_loss.mutable_data_ptr(),
         call.loss.mutable_data_ptr(), wants_gradient ? call.gradient.mutable_data_ptr() : nullptr,
         mutable_data<double>(sums), call.rows, call.d, ignore_index, Simplex::of_dimension(call.d),
         call.options<double>(double(call.d + 1)), call.reduction, cuda_dtype(z.scalar_type()), stream});
  });
  return {call.loss, call.gradient};
}

Tensor scale_rows_cuda(Tensor gradient, Tensor upstream) {
  const torch::stable::accelerator::DeviceGuard guard(gradient.get_device_index());
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
      "bool wants_gradient) -> (Tensor loss, Tensor gradient)");
  m.def("scale_rows(Tensor gradient, Tensor upstream) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) {
  m.impl("simplex_cross_entropy", TORCH_BOX(&simplexfix::simplex_cross_entropy_cpu));
  m.impl("scale_rows", TORCH_BOX(&simplexfix::scale_rows_cpu));
}
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) {
  m.impl("simplex_cross_entropy", TORCH_BOX(&simplexfix::simplex_cross_entropy_cuda));
  m.impl("scale_rows", TORCH_BOX(&simplexfix::scale_rows_cuda));
}
#endif
