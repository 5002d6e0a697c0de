// Launches the kernels of scale_rows.cuh.
#include "scale_rows.cuh"

#include "launch.cuh"

namespace simplexfix::cuda {

const char* scale_rows(const ScaleArgs& args) {
  const int64_t total = args.rows * args.cols;
  if (total == 0) return nullptr;
  return dispatch(args.dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t piece = args.factor_stride ? args.cols : kFlatPiece;
    const int64_t pieces = (total + piece - 1) / piece;
    const ScaleParams<T> params{static_cast<const T*>(args.in),
                                static_cast<const accumulate_t<T>*>(args.factor),
                                static_cast<const accumulate_t<T>*>(args.divisor),
                                static_cast<T*>(args.out),
                                args.factor_stride,
                                pieces,
                                piece,
                                total};
    return launch_kernel(scale_rows<T>, blocks_for(pieces, 1), kScaleThreads, 0, args.stream, params);
  });
}

}  // namespace simplexfix::cuda
