// Launches the kernels of cross_entropy.cuh for one polytope, between those of loss_sums.cuh.
#pragma once
#include <algorithm>

#include "cross_entropy.cuh"
#include "launch.cuh"

namespace simplexfix::cuda {

// Rows in chunks are processed in groups of this many bytes, so that a second read hits L2 on most GPUs (A100: 40 MB,
// H100: 50 MB). The tests lower it.
#ifndef SIMPLEXFIX_GROUP_BYTES
#define SIMPLEXFIX_GROUP_BYTES (16 << 20)
#endif

template <typename T>
bool is_staged(int64_t d) {
  return staged_size<T>(d) * int64_t(sizeof(T)) <= kStagedBytes;
}

// Returns the size of the chunks of a row that is not staged. It depends on the row's length only.
inline int chunk_size(int64_t d) {
  constexpr int64_t step = kChunkThreads * 8;  // a multiple of all threads' vectors, whatever the dtype
  const int64_t size = std::max<int64_t>(kChunkElements, (d + kMostChunks - 1) / kMostChunks);
  return int((size + step - 1) / step * step);
}
inline int chunk_count(int64_t d) { return int((d + chunk_size(d) - 1) / chunk_size(d)); }

template <typename T>
int64_t rows_of_group(int64_t rows, int64_t d) {
  return std::min(rows, std::max<int64_t>(1, SIMPLEXFIX_GROUP_BYTES / (d * int64_t(sizeof(T)))));
}

// Maximum size of a chunk's Sums and Terms together, in numbers of the accumulating type.
constexpr int kChunkNumbers = 8;

template <typename Loss, typename T, int kThreads>
const char* launch_staged(const CrossEntropyParams<Loss, T>& params, void* stream) {
  using Rows = Team<kThreads>;
  return launch_kernel(cross_entropy<Loss, T, kThreads>, blocks_for(params.rows, Rows::kTeams), Rows::kBlock,
                       Rows::kTeams * staged_size<T>(params.d) * int64_t(sizeof(T)), stream, params);
}

template <typename Loss, typename T>
const char* launch_chunks(CrossEntropyParams<Loss, T> params, void* workspace, void* stream) {
  using Sums = typename Loss::Sums;
  using Terms = typename Loss::Terms;
  static_assert(sizeof(Sums) + sizeof(Terms) <= kChunkNumbers * sizeof(accumulate_t<T>));
  const int64_t rows = params.rows, group = rows_of_group<T>(rows, params.d);
  Chunks<Loss> chunks{chunk_size(params.d), chunk_count(params.d), static_cast<Sums*>(workspace), nullptr};
  chunks.terms = reinterpret_cast<Terms*>(chunks.sums + group * chunks.count);
  for (int64_t row = 0; row < rows; row += group) {
    params.rows = std::min(group, rows - row);
    for (auto kernel : {cross_entropy_chunk<Loss, T, Sweep::kSums>, cross_entropy_chunk<Loss, T, Sweep::kTerms>,
                        cross_entropy_chunk<Loss, T, Sweep::kGradient>}) {
      const char* error =
          launch_kernel(kernel, blocks_for(params.rows * chunks.count, 1), kChunkThreads, 0, stream, params, chunks);
      if (error) return error;
    }
    params.z += params.rows * params.z_stride;
    params.target += params.rows;
    params.row_loss += params.rows;
    if (params.gradient) params.gradient += params.rows * params.d;
  }
  return nullptr;
}

template <typename Loss, typename T>
const char* launch_cross_entropy(const CrossEntropyArgs& args, const typename Loss::Constants& constants) {
  using A = accumulate_t<T>;
  const CrossEntropyParams<Loss, T> params{static_cast<const T*>(args.z),
                                           args.target,
                                           static_cast<const A*>(args.weight),
                                           args.workspace,
                                           static_cast<A*>(args.row_loss),
                                           static_cast<T*>(args.gradient),
                                           args.z_stride,
                                           args.rows,
                                           args.d,
                                           args.slots,
                                           args.ignore_index,
                                           round_options<A>(args.options),
                                           args.reduction == Reduction::kMean && !args.divisor,
                                           constants};
  if (const char* error = launch_target_sums(args)) return error;
  if (args.rows > 0) {
    const char* error = args.d <= 256 ? launch_staged<Loss, T, 32>(params, args.stream)
                        : staged_size<T>(args.d) * int64_t(sizeof(T)) <= kShortBytes
                            ? launch_staged<Loss, T, 128>(params, args.stream)
                        : is_staged<T>(args.d) ? launch_staged<Loss, T, 512>(params, args.stream)
                                               : launch_chunks<Loss, T>(params, args.workspace + 2, args.stream);
    if (error) return error;
  }
  return launch_reduce_loss(args);
}

}  // namespace simplexfix::cuda
