// Launches the kernels of cross_entropy.cuh for the simplex.
#include "simplex_cross_entropy.cuh"

#include "cross_entropy_launch.cuh"

namespace simplexfix::cuda {

const char* simplex_cross_entropy(const CrossEntropyArgs& args) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    return launch_cross_entropy<SimplexLoss<A>, T>(args, RoundedSimplex<A>(Simplex::of_dimension(args.d)));
  });
}

}  // namespace simplexfix::cuda
