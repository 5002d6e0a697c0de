// Launches of simplex_cross_entropy.cuh.
#include "simplex_cross_entropy.cuh"

#include "launch.cuh"

namespace simplexfix::cuda {
namespace {

template <typename T, int kThreads, bool kKept>
const char* launch_rows(const CrossEntropyParams<T>& params, void* stream) {
  using Rows = Team<kThreads>;
  const int64_t shared = kKept ? Rows::kTeams * kept_slot<T>(params.d) * int64_t(sizeof(T)) : 0;
  return launch_kernel(simplex_cross_entropy<T, kThreads, kKept>, blocks_for(params.rows, Rows::kTeams), Rows::kBlock,
                       shared, stream, params);
}

template <typename T>
const char* launch(const CrossEntropyArgs& args) {
  using A = accumulate_t<T>;
  const CrossEntropyParams<T> params{static_cast<const T*>(args.z),
                                     args.target,
                                     static_cast<const A*>(args.weight),
                                     args.sums,
                                     static_cast<A*>(args.row_loss),
                                     static_cast<T*>(args.gradient),
                                     args.z_stride,
                                     args.rows,
                                     args.d,
                                     args.ignore_index,
                                     RoundedSimplex<A>(args.simplex),
                                     round_options<A>(args.options),
                                     args.reduction == Reduction::kMean};
  const bool weight_sum = params.weight && params.options.smoothing > A(0);
  if (params.mean || weight_sum) {
    const char* error = launch_kernel(target_sums<A>, weight_sum ? 2 : 1, kReduceThreads, 0, args.stream, params.target,
                                      params.weight, params.rows, params.d, params.ignore_index, args.sums);
    if (error) return error;
  }
  if (args.rows > 0) {
    const char* error = args.d <= 256 ? launch_rows<T, 32, true>(params, args.stream)
                        : kept_slot<T>(args.d) * int64_t(sizeof(T)) <= kKeptBytes
                            ? launch_rows<T, 128, true>(params, args.stream)
                            : launch_rows<T, 512, false>(params, args.stream);
    if (error) return error;
  }
  if (args.reduction == Reduction::kNone) return nullptr;
  return launch_kernel(reduce_loss<A>, 1, kReduceThreads, 0, args.stream, static_cast<const A*>(params.row_loss),
                       args.rows, params.mean ? params.sums : nullptr, static_cast<A*>(args.loss));
}

}  // namespace

const char* simplex_cross_entropy(const CrossEntropyArgs& args) {
  return dispatch(args.dtype, [&](auto tag) { return launch<decltype(tag)>(args); });
}

}  // namespace simplexfix::cuda
