// Launches the kernels of loss_sums.cuh, and computes the workspace of a loss.
#include "loss_sums.cuh"

#include "cross_entropy_launch.cuh"

namespace simplexfix::cuda {

const char* launch_target_sums(const CrossEntropyArgs& args) {
  const bool weight_sum = args.weight && args.options.smoothing > 0;
  if (args.reduction != Reduction::kMean && !weight_sum) return nullptr;
  const auto launch = [&](auto tag) {
    return launch_kernel(target_sums<decltype(tag)>, weight_sum ? 2 : 1, kReduceThreads, 0, args.stream, args.target,
                         static_cast<const decltype(tag)*>(args.weight), args.rows, args.slots, args.ignore_index,
                         args.workspace, static_cast<decltype(tag)*>(args.divisor));
  };
  return args.dtype == DType::kDouble ? launch(double{}) : launch(float{});
}

const char* launch_reduce_loss(const CrossEntropyArgs& args) {
  if (args.reduction == Reduction::kNone) return nullptr;
  const double* sums = args.reduction == Reduction::kMean ? args.workspace : nullptr;
  const auto launch = [&](auto tag) {
    using A = decltype(tag);
    return launch_kernel(reduce_loss<A>, 1, kReduceThreads, 0, args.stream, static_cast<const A*>(args.row_loss),
                         args.rows, sums, static_cast<A*>(args.loss));
  };
  return args.dtype == DType::kDouble ? launch(double{}) : launch(float{});
}

int64_t cross_entropy_workspace(int64_t rows, int64_t d, DType dtype) {
  int64_t doubles = 2;
  dispatch(dtype, [&](auto tag) -> const char* {
    using T = decltype(tag);
    if (!is_staged<T>(d))
      doubles += rows_of_group<T>(rows, d) * chunk_count(d) * kChunkNumbers * int64_t(sizeof(accumulate_t<T>)) / 8;
    return nullptr;
  });
  return doubles;
}

}  // namespace simplexfix::cuda
