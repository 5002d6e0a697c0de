// Launches the kernels of contrast.cuh.
#include "contrast.cuh"

#include "launch.cuh"

namespace simplexfix::cuda {
namespace {

template <int kThreads, typename P>
const char* launch_teams(void (*kernel)(P), const P& params, void* stream) {
  using Rows = Team<kThreads>;
  return launch_kernel(kernel, blocks_for(params.rows, Rows::kTeams), Rows::kBlock, 0, stream, params);
}

template <typename A>
const char* contrast_rows_of(const ContrastArgs& args) {
  const ContrastParams<A> params{static_cast<A*>(args.similarity),
                                 args.anchor_class,
                                 args.candidate_class,
                                 static_cast<const A*>(args.anchor_scale),
                                 static_cast<const A*>(args.candidate_scale),
                                 static_cast<const A*>(args.upstream),
                                 static_cast<A*>(args.loss),
                                 args.rows,
                                 args.candidates,
                                 args.first_positive,
                                 A(args.mu),
                                 args.negatives};
  return launch_teams<kContrastThreads>(contrast_rows<A>, params, args.stream);
}

}  // namespace

const char* contrast_rows(const ContrastArgs& args) {
  if (args.rows == 0) return nullptr;
  return args.dtype == DType::kDouble ? contrast_rows_of<double>(args) : contrast_rows_of<float>(args);
}

const char* inverse_norms(const NormArgs& args) {
  if (args.rows == 0) return nullptr;
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const NormParams<T> params{static_cast<const T*>(args.z), static_cast<accumulate_t<T>*>(args.out), args.z_stride,
                               args.rows, args.d};
    return args.d <= 256 ? launch_teams<32>(inverse_norms<T, 32>, params, args.stream)
                         : launch_teams<256>(inverse_norms<T, 256>, params, args.stream);
  });
}

const char* project_rows(const ProjectArgs& args) {
  if (args.rows == 0) return nullptr;
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const ProjectParams<T> params{static_cast<const T*>(args.z),
                                  static_cast<const A*>(args.grad_unit),
                                  static_cast<const A*>(args.inverse_norm),
                                  static_cast<T*>(args.out),
                                  args.z_stride,
                                  args.rows,
                                  args.d};
    return args.d <= 256 ? launch_teams<32>(project_rows<T, 32>, params, args.stream)
                         : launch_teams<256>(project_rows<T, 256>, params, args.stream);
  });
}

}  // namespace simplexfix::cuda
