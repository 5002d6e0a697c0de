// Launches the kernels of cross_entropy.cuh for the cube.
#include "cube_cross_entropy.cuh"

#include <cmath>

#include "cross_entropy_launch.cuh"

namespace simplexfix::cuda {

const char* cube_cross_entropy(const CrossEntropyArgs& args, const int64_t* codes) {
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    using A = accumulate_t<T>;
    const double inverse_slots = std::ldexp(1.0, -int(std::min<int64_t>(args.d, 2000)));  // 0 if 2^-d underflows
    return launch_cross_entropy<CubeLoss<A>, T>(
        args, {A(1 / std::sqrt(double(args.d))), A(inverse_slots), codes, (args.d + 63) / 64});
  });
}

}  // namespace simplexfix::cuda
