// Launches the kernels of simplex_logits.cuh.
#include "simplex_logits.cuh"

#include "launch.cuh"

namespace simplexfix::cuda {
namespace {

template <int kThreads, typename T>
const char* launch_rows(void (*kernel)(LogitsParams<T>), const LogitsParams<T>& params, void* stream) {
  using Rows = Team<kThreads>;
  return launch_kernel(kernel, blocks_for(params.rows, Rows::kTeams), Rows::kBlock, 0, stream, params);
}

template <typename T>
LogitsParams<T> params_of(const LogitsArgs& args) {
  using A = accumulate_t<T>;
  return {static_cast<const T*>(args.z),
          static_cast<const T*>(args.logits_gradient),
          static_cast<T*>(args.out),
          args.z_stride,
          args.rows,
          args.d,
          RoundedSimplex<A>(args.simplex),
          A(args.scale),
          args.normalize};
}

}  // namespace

const char* simplex_logits(const LogitsArgs& args) {
  if (args.rows == 0) return nullptr;
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto params = params_of<T>(args);
    return args.d <= 256 ? launch_rows<32>(simplex_logits<T, 32>, params, args.stream)
                         : launch_rows<256>(simplex_logits<T, 256>, params, args.stream);
  });
}

const char* simplex_logits_backward(const LogitsArgs& args) {
  if (args.rows == 0) return nullptr;
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const auto params = params_of<T>(args);
    return args.d <= 256 ? launch_rows<32>(simplex_logits_backward<T, 32>, params, args.stream)
                         : launch_rows<256>(simplex_logits_backward<T, 256>, params, args.stream);
  });
}

}  // namespace simplexfix::cuda
