// The front that the cross-entropies of all polytopes share: checks, allocation, the CPU's run over the rows.
#pragma once
#include <limits>
#include <memory>

#include "../core/cross_entropy.h"
#include "../cpu/kernels.h"
#include "buffer_pool.h"
#include "common.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {

// A gradient of this size or more would drive everything else out of the caches before it is read again.
constexpr int64_t kStreamBytes = int64_t(8) << 20;

// The operator's arguments, checked; and its results, allocated.
struct CrossEntropyCall {
  Tensor z, target, loss, gradient;
  std::optional<Tensor> weight;  // in the accumulating dtype
  int64_t rows, d, slots;
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

// z has slots classes: what target and weight are checked against.
inline CrossEntropyCall check_cross_entropy(const Tensor& z, const Tensor& target, int64_t slots, bool normalize,
                                            double scale, int64_t margin_kind, double margin_size,
                                            const std::optional<Tensor>& weight, int64_t ignore_index, double smoothing,
                                            int64_t reduction, bool wants_gradient, ScalarType loss_dtype) {
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
  SIMPLEXFIX_CHECK(loss_dtype == type || loss_dtype == accumulate, "loss_dtype must be ",
                   torch::headeronly::toString(type), " or ", torch::headeronly::toString(accumulate), ", got ",
                   torch::headeronly::toString(loss_dtype));
  if (weight) {
    SIMPLEXFIX_CHECK(weight->dim() == 1 && weight->size(0) == slots, "weight must have shape [", slots, "], got ",
                     weight->dim(), " dimensions, ", weight->numel(), " elements");
    SIMPLEXFIX_CHECK(weight->scalar_type() == accumulate, "weight must be ", torch::headeronly::toString(accumulate),
                     ", got ", torch::headeronly::toString(weight->scalar_type()));
    SIMPLEXFIX_CHECK(weight->device() == z.device(), "weight and z are on different devices");
  }
  CrossEntropyCall call{with_dense_rows(z),
                        as_contiguous(target),
                        {},
                        {},
                        {},
                        rows,
                        d,
                        slots,
                        normalize,
                        wants_gradient,
                        scale,
                        margin_size,
                        smoothing,
                        ignore_index,
                        static_cast<Margin>(margin_kind),
                        static_cast<Reduction>(reduction)};
  if (weight) call.weight = as_contiguous(*weight);
  const std::vector<int64_t> gradient_shape = wants_gradient ? std::vector<int64_t>{rows, d} : std::vector<int64_t>{0};
  const std::vector<int64_t> loss_shape =
      call.reduction == Reduction::kNone ? std::vector<int64_t>{rows} : std::vector<int64_t>{};
  // of the CPU's own: torch's allocation, asked for by name, takes as long as 16 rows of 1,023 numbers
  call.gradient = z.is_cpu() ? reusable_empty(gradient_shape, type) : torch::stable::new_empty(call.z, gradient_shape);
  call.loss =
      z.is_cpu() ? reusable_empty(loss_shape, loss_dtype) : torch::stable::new_empty(call.z, loss_shape, loss_dtype);
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

// Rounded to what the loss is to be: a cast by torch afterwards would take as long as all of a small batch.
template <typename A>
void set_loss(const Tensor& loss, const A* values, int64_t n) {
  switch (loss.scalar_type()) {
    case ScalarType::BFloat16: std::copy_n(values, n, mutable_data<torch::headeronly::BFloat16>(loss)); break;
    case ScalarType::Half: std::copy_n(values, n, mutable_data<torch::headeronly::Half>(loss)); break;
    default: std::copy_n(values, n, mutable_data<A>(loss));
  }
}

// kernel(args, begin, end) does rows of a cpu::CrossEntropyArgs<T>.
template <typename F>
void cross_entropy_cpu(const CrossEntropyCall& call, F&& kernel) {
  dispatch_floating(call.z.scalar_type(), [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const int64_t* targets = data<int64_t>(call.target);
    const A* weights = call.weight ? data<A>(*call.weight) : nullptr;
    const double counted = weigh_targets(targets, call.rows, weights, call.slots, call.ignore_index);
    double weight_sum = double(call.slots);
    if (weights && call.smoothing > 0) {
      weight_sum = 0;
      for (int64_t c = 0; c < call.slots; ++c) weight_sum += double(weights[c]);
    }
    const std::unique_ptr<A[]> row_loss(new A[size_t(call.rows)]);
    const double mean = call.reduction == Reduction::kMean ? 1.0 / counted : 1.0;
    const cpu::CrossEntropyArgs<T> args{data<T>(call.z),
                                        call.rows > 1 ? call.z.stride(0) : call.d,
                                        targets,
                                        weights,
                                        row_loss.get(),
                                        call.wants_gradient ? mutable_data<T>(call.gradient) : nullptr,
                                        call.d,
                                        call.ignore_index,
                                        call.rows * call.d * int64_t(sizeof(T)) >= kStreamBytes,
                                        A(mean),
                                        call.options<A>(A(weight_sum))};
    for_rows(call.rows, call.d, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
    if (call.reduction == Reduction::kNone) return set_loss(call.loss, args.loss, call.rows);
    double sum = 0;  // in row order, whatever thread did which rows
    for (int64_t b = 0; b < call.rows; ++b) sum += double(args.loss[b]);
    // a mean over nothing is nan, as in torch
    const A loss = A(call.reduction == Reduction::kMean ? sum / counted : sum);
    set_loss(call.loss, &loss, 1);
  });
}

#ifdef SIMPLEXFIX_WITH_CUDA
// launchers(cuda::CrossEntropyArgs) starts a polytope's kernels.  Targets and weights are looked at on the device
// alone.
template <typename F>
void cross_entropy_cuda(const CrossEntropyCall& call, const char* name, F&& launchers) {
  const ScalarType type = call.z.scalar_type(), accumulate = accumulate_type(type);
  const cuda::DType dtype = cuda_dtype(type);
  const bool whole = call.reduction == Reduction::kNone;
  const std::vector<int64_t> loss_shape = whole ? std::vector<int64_t>{call.rows} : std::vector<int64_t>{};
  const bool wide = call.loss.scalar_type() == accumulate;
  const Tensor loss = wide ? call.loss : torch::stable::new_empty(call.z, loss_shape, accumulate);
  const Tensor row_loss = whole ? loss : torch::stable::new_empty(call.z, {call.rows}, accumulate);
  const Tensor workspace =
      torch::stable::new_empty(call.z, {cuda::cross_entropy_workspace(call.rows, call.d, dtype)}, ScalarType::Double);
  const int32_t device = call.z.get_device_index();
  launch(device, name, [&](void* stream) {
    return launchers(cuda::CrossEntropyArgs{
        call.z.const_data_ptr(), call.rows > 1 ? call.z.stride(0) : call.d, data<int64_t>(call.target),
        call.weight ? call.weight->const_data_ptr() : nullptr, row_loss.mutable_data_ptr(), loss.mutable_data_ptr(),
        call.wants_gradient ? call.gradient.mutable_data_ptr() : nullptr, mutable_data<double>(workspace), call.rows,
        call.d, call.slots, call.ignore_index, call.options<double>(double(call.slots)), call.reduction, dtype,
        stream});
  });
  if (!wide) torch::stable::copy_(const_cast<Tensor&>(call.loss), loss);
}
#endif

}  // namespace simplexfix
