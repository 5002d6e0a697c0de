// The cross-entropy operators of all polytopes: schema, argument checks, allocation, and the kernel call on each
// device.
#pragma once
#include <limits>
#include <memory>
#include <string>

#include "../core/cross_entropy.h"
#include "../cpu/kernels.h"
#include "buffer_pool.h"
#include "common.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {

// Gradients of at least this size use non-temporal stores. Cached stores would evict all other data, and the gradient
// itself would be evicted before it is read.
constexpr int64_t kNonTemporalBytes = int64_t(8) << 20;

// Arguments common to the operators of all polytopes, as torch passes them.
struct CrossEntropyArguments {
  const Tensor &z, &target;
  bool normalize;
  double scale;
  int64_t margin_kind;
  double margin_size;
  const std::optional<Tensor>& weight;
  int64_t ignore_index;
  double smoothing;
  int64_t reduction;
  bool wants_gradient;
  ScalarType loss_dtype;
};

// The checked arguments and the allocated results.
struct CrossEntropyCall {
  Tensor z, target, loss, gradient;
  std::optional<Tensor> weight;  // in the accumulating dtype
  int64_t rows, d, slots;
  bool normalize, wants_gradient;
  // A float16 gradient of a mean would underflow before the backward pass multiplies it by the upstream gradient,
  // GradScaler's scale. So the gradient is that of the sum, and loss [2] is the mean and its divisor, for scale_rows.
  bool divides_later;
  double scale, margin_size, smoothing;
  int64_t ignore_index;
  Margin margin;
  Reduction reduction;

  int64_t z_stride() const { return rows > 1 ? z.stride(0) : d; }

  template <typename A>
  CrossEntropyOptions<A> options(A weight_sum) const {
    return {.normalize = normalize,
            .scale = A(scale),
            .margin = margin,
            .margin_size = A(margin_size),
            .smoothing = A(smoothing),
            .weight_sum = weight_sum};
  }
};

// Checks the arguments and allocates the results. z must have passed check_rows. slots is K, the number of
// vertices, free slots included.
inline CrossEntropyCall check_cross_entropy(const CrossEntropyArguments& given, int64_t slots) {
  const auto& [z, target, normalize, scale, margin_kind, margin_size, weight, ignore_index, smoothing, reduction,
               wants_gradient, loss_dtype] = given;
  const int64_t rows = z.size(0), d = z.size(1);
  const ScalarType type = z.scalar_type(), accumulate = accumulate_type(type);
  SIMPLEXFIX_CHECK(target.dim() == 1 && target.size(0) == rows, "target must have shape [", rows, "], got ",
                   shape_of(target));
  SIMPLEXFIX_CHECK(target.scalar_type() == ScalarType::Long, "target must be int64, got ",
                   torch::headeronly::toString(target.scalar_type()));
  SIMPLEXFIX_CHECK(target.device() == z.device(), "target and z must be on the same device");
  SIMPLEXFIX_CHECK(scale > 0 && scale <= std::numeric_limits<double>::max(), "scale must be positive and finite, got ",
                   scale);
  SIMPLEXFIX_CHECK(margin_kind >= 0 && margin_kind <= 2,
                   "margin_kind must be 0 (none), 1 (cosine) or 2 (angular), got ", margin_kind);
  SIMPLEXFIX_CHECK(margin_kind == 0 || normalize, "margin needs normalize=True: it is a margin on cosines");
  SIMPLEXFIX_CHECK(smoothing >= 0 && smoothing <= 1, "label_smoothing must lie in [0, 1], got ", smoothing);
  SIMPLEXFIX_CHECK(reduction >= 0 && reduction <= 2, "reduction must be 0 (none), 1 (mean) or 2 (sum), got ",
                   reduction);
  SIMPLEXFIX_CHECK(loss_dtype == type || loss_dtype == accumulate, "loss_dtype must be ",
                   torch::headeronly::toString(type), " or ", torch::headeronly::toString(accumulate), ", got ",
                   torch::headeronly::toString(loss_dtype));
  if (weight) {
    SIMPLEXFIX_CHECK(weight->dim() == 1 && weight->size(0) == slots, "weight must have shape [", slots, "], got ",
                     shape_of(*weight));
    SIMPLEXFIX_CHECK(weight->scalar_type() == accumulate, "weight must be ", torch::headeronly::toString(accumulate),
                     ", got ", torch::headeronly::toString(weight->scalar_type()));
    SIMPLEXFIX_CHECK(weight->device() == z.device(), "weight and z must be on the same device");
  }
  const bool divides_later =
      wants_gradient && type == ScalarType::Half && static_cast<Reduction>(reduction) == Reduction::kMean;
  SIMPLEXFIX_CHECK(!divides_later || loss_dtype == accumulate, "loss_dtype must be ",
                   torch::headeronly::toString(accumulate), " for the gradient of a mean of ",
                   torch::headeronly::toString(type), ", got ", torch::headeronly::toString(loss_dtype));
  CrossEntropyCall call{.z = with_dense_rows(z),
                        .target = as_contiguous(target),
                        .loss = {},
                        .gradient = {},
                        .weight = {},
                        .rows = rows,
                        .d = d,
                        .slots = slots,
                        .normalize = normalize,
                        .wants_gradient = wants_gradient,
                        .divides_later = divides_later,
                        .scale = scale,
                        .margin_size = margin_size,
                        .smoothing = smoothing,
                        .ignore_index = ignore_index,
                        .margin = static_cast<Margin>(margin_kind),
                        .reduction = static_cast<Reduction>(reduction)};
  if (weight) call.weight = as_contiguous(*weight);
  const std::vector<int64_t> gradient_shape = wants_gradient ? std::vector<int64_t>{rows, d} : std::vector<int64_t>{0};
  const std::vector<int64_t> loss_shape = call.reduction == Reduction::kNone ? std::vector<int64_t>{rows}
                                          : divides_later                    ? std::vector<int64_t>{2}
                                                                             : std::vector<int64_t>{};
  // Allocate from the buffer pool on the CPU: dispatching new_empty takes as long as 16 rows of 1,023 numbers.
  call.gradient = z.is_cpu() ? reusable_empty(gradient_shape, type) : torch::stable::new_empty(call.z, gradient_shape);
  call.loss =
      z.is_cpu() ? reusable_empty(loss_shape, loss_dtype) : torch::stable::new_empty(call.z, loss_shape, loss_dtype);
  return call;
}

// Returns the sum of the class weights over all rows that are not ignored: the divisor of a mean. Each row counts 1
// without weights. Throws if a target is out of range.
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

// Writes n losses in the dtype of `loss`. A later cast by torch would take as long as a whole small batch.
template <typename A>
void set_loss(const Tensor& loss, const A* values, int64_t n) {
  switch (loss.scalar_type()) {
    case ScalarType::BFloat16: std::copy_n(values, n, mutable_data<torch::headeronly::BFloat16>(loss)); break;
    case ScalarType::Half: std::copy_n(values, n, mutable_data<torch::headeronly::Half>(loss)); break;
    default: std::copy_n(values, n, mutable_data<A>(loss));
  }
}

struct OnCpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };

  template <typename Polytope>
  static void run(const CrossEntropyCall& call, const Polytope& polytope) {
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
      const cpu::CrossEntropyArgs<T> args{
          .z = data<T>(call.z),
          .z_stride = call.z_stride(),
          .target = targets,
          .weight = weights,
          .loss = row_loss.get(),
          .gradient = call.wants_gradient ? mutable_data<T>(call.gradient) : nullptr,
          .d = call.d,
          .ignore_index = call.ignore_index,
          .non_temporal = call.rows * call.d * int64_t(sizeof(T)) >= kNonTemporalBytes,
          .upstream = A(call.reduction == Reduction::kMean && !call.divides_later ? 1.0 / counted : 1.0),
          .options = call.options<A>(A(weight_sum))};
      for_rows(call.rows, call.d, [&](int64_t begin, int64_t end) { polytope.rows(args, begin, end); });
      if (call.reduction == Reduction::kNone) return set_loss(call.loss, args.loss, call.rows);
      double sum = 0;  // in row order, whichever thread computed each row
      for (int64_t b = 0; b < call.rows; ++b) sum += double(args.loss[b]);
      // The mean over no rows is nan, as in torch.
      const A loss[2] = {A(call.reduction == Reduction::kMean ? sum / counted : sum), A(counted)};
      set_loss(call.loss, loss, call.divides_later ? 2 : 1);
    });
  }
};

#ifdef SIMPLEXFIX_WITH_CUDA
struct OnCuda {
  struct Guard {
    torch::stable::accelerator::DeviceGuard guard;
    explicit Guard(const Tensor& z) : guard(cuda_device(z, "z")) {}
  };

  // Only the device reads targets and weights: reading them on the host would synchronize.
  template <typename Polytope>
  static void run(const CrossEntropyCall& call, const Polytope& polytope) {
    const ScalarType type = call.z.scalar_type(), accumulate = accumulate_type(type);
    const cuda::DType dtype = cuda_dtype(type);
    const bool by_row = call.reduction == Reduction::kNone;
    const bool wide = call.loss.scalar_type() == accumulate;
    const std::vector<int64_t> loss_shape = by_row ? std::vector<int64_t>{call.rows} : std::vector<int64_t>{};
    const Tensor loss = wide ? call.loss : torch::stable::new_empty(call.z, loss_shape, accumulate);
    const Tensor row_loss = by_row ? loss : torch::stable::new_empty(call.z, {call.rows}, accumulate);
    const Tensor workspace =
        torch::stable::new_empty(call.z, {cuda::cross_entropy_workspace(call.rows, call.d, dtype)}, ScalarType::Double);
    launch(call.z.get_device_index(), Polytope::kOperator, [&](void* stream) {
      return polytope.launch({.z = call.z.const_data_ptr(),
                              .z_stride = call.z_stride(),
                              .target = data<int64_t>(call.target),
                              .weight = call.weight ? call.weight->const_data_ptr() : nullptr,
                              .row_loss = row_loss.mutable_data_ptr(),
                              .loss = loss.mutable_data_ptr(),
                              .gradient = call.wants_gradient ? call.gradient.mutable_data_ptr() : nullptr,
                              .divisor = call.divides_later ? mutable_data<float>(loss) + 1 : nullptr,
                              .workspace = mutable_data<double>(workspace),
                              .rows = call.rows,
                              .d = call.d,
                              .slots = call.slots,
                              .ignore_index = call.ignore_index,
                              .options = call.options<double>(double(call.slots)),
                              .reduction = call.reduction,
                              .dtype = dtype,
                              .stream = stream});
    });
    if (!wide) torch::stable::copy_(const_cast<Tensor&>(call.loss), loss);
  }
};
#endif

// The operator of one polytope on one device. Own are the arguments that only this polytope has; they stand between
// target and the common ones. A Polytope provides:
//
//   kOperator               the operator's name
//   Polytope(z, own...)     a constructor that checks the arguments Own
//   slots                   the number of vertices K
//   check(call)             rejects common arguments that this polytope does not support
//   rows(args, begin, end)  computes rows [begin, end) of a cpu::CrossEntropyArgs<T>
//   launch(args)            launches the kernels for a cuda::CrossEntropyArgs; only in builds with CUDA
template <typename Device, typename Polytope, typename... Own>
std::tuple<Tensor, Tensor> cross_entropy(Tensor z, Tensor target, Own... own, bool normalize, double scale,
                                         int64_t margin_kind, double margin_size, std::optional<Tensor> weight,
                                         int64_t ignore_index, double smoothing, int64_t reduction, bool wants_gradient,
                                         ScalarType loss_dtype) {
  const typename Device::Guard guard(z);
  check_rows(z, "z");
  const Polytope polytope(z, own...);
  const CrossEntropyCall call = check_cross_entropy({.z = z,
                                                     .target = target,
                                                     .normalize = normalize,
                                                     .scale = scale,
                                                     .margin_kind = margin_kind,
                                                     .margin_size = margin_size,
                                                     .weight = weight,
                                                     .ignore_index = ignore_index,
                                                     .smoothing = smoothing,
                                                     .reduction = reduction,
                                                     .wants_gradient = wants_gradient,
                                                     .loss_dtype = loss_dtype},
                                                    polytope.slots);
  polytope.check(call);
  Device::run(call, polytope);
  return {call.loss, call.gradient};
}

// own: the schema of the arguments Own with a trailing comma, for example "Tensor? codes, ".
inline std::string cross_entropy_schema(const std::string& name, const std::string& own = "") {
  return name + "(Tensor z, Tensor target, " + own +
         "bool normalize, float scale, int margin_kind, float margin_size, Tensor? weight, int ignore_index, "
         "float label_smoothing, int reduction, bool wants_gradient, ScalarType loss_dtype) -> "
         "(Tensor loss, Tensor gradient)";
}

}  // namespace simplexfix
