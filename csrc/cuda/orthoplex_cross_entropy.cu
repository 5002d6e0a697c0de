// Launches the kernels of cross_entropy.cuh for the orthoplex.
#include "orthoplex_cross_entropy.cuh"

#include "cross_entropy_launch.cuh"

namespace simplexfix::cuda {

const char* orthoplex_cross_entropy(const CrossEntropyArgs& args) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    return launch_cross_entropy<OrthoplexLoss<accumulate_t<T>>, T>(args, {});
  });
}

}  // namespace simplexfix::cuda
