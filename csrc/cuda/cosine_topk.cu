// Exact search by cosine: launches the kernels of topk_rows.cuh, topk_tiles.cuh and topk_select.cuh.
//
// Queries are processed in chunks, so that buckets and lists stay within TopkLimits::bytes. The host reads nothing from
// the device in between, and shapes alone determine the launches, so a CUDA graph can hold them. Memory besides the
// results: about 2 bytes for each number of the gallery and 6 for each of the queries, plus that limit.
#include "launch.cuh"
#include "topk_rows.cuh"
#include "topk_select.cuh"
#include "topk_tiles.cuh"

namespace simplexfix::cuda {
namespace {

int64_t power_of_two(int64_t least) {
  int64_t power = 1;
  while (power < least) power *= 2;
  return power;
}

template <typename T>
T* buffer(const CosineTopkArgs& args, TopkBuffer which) {
  return static_cast<T*>(args.buffers[int(which)]);
}

}  // namespace

CosineTopkPlan plan_cosine_topk(int64_t queries, int64_t n, int64_t d, int64_t k, const TopkLimits& limits) {
  CosineTopkPlan plan{};
  const int64_t wanted = k < n ? k : n, tiles = ceil_div(n, kTile);
  plan.first_pass = k <= n / 4;  // if a quarter is wanted, nearly all rows pass
  plan.pitch = ceil_div(d, 8) * 8;
  if (plan.first_pass) {  // at least four buckets per result
    const int64_t least = ceil_div(4 * k, kTile);
    plan.splits = limits.splits > least ? limits.splits : least;
    if (plan.splits > tiles) plan.splits = tiles;
  }
  const int64_t least = (plan.first_pass ? 4 : 2) * power_of_two(wanted);
  plan.capacity = limits.capacity > least ? limits.capacity : least;
  const int64_t buckets = plan.splits * kTile;
  const int64_t each = buckets * int64_t(sizeof(float)) + plan.capacity * int64_t(sizeof(Candidate));
  plan.chunk = limits.bytes / each;
  if (plan.chunk > kTile) plan.chunk = plan.chunk / kTile * kTile;
  if (plan.chunk < 1) plan.chunk = 1;
  if (plan.chunk > queries) plan.chunk = queries;
  const auto needs = [&](TopkBuffer which, int64_t count, size_t size) {
    plan.bytes[int(which)] = count * int64_t(size);
  };
  needs(TopkBuffer::kQueryUnit, queries * d, sizeof(float));
  needs(TopkBuffer::kQueryNorm, queries, sizeof(double));
  needs(TopkBuffer::kQueryErrorBound, queries, sizeof(float));
  needs(TopkBuffer::kRowNorm, n, sizeof(double));
  needs(TopkBuffer::kRowErrorBound, n, sizeof(float));
  needs(TopkBuffer::kNonFiniteRows, 1, sizeof(unsigned long long));
  needs(TopkBuffer::kList, plan.chunk * plan.capacity, sizeof(Candidate));
  if (!plan.first_pass) return plan;
  needs(TopkBuffer::kQueryCode, queries * plan.pitch, sizeof(__nv_bfloat16));
  needs(TopkBuffer::kRowCode, n * plan.pitch, sizeof(__nv_bfloat16));
  needs(TopkBuffer::kBest, plan.chunk * buckets, sizeof(float));
  needs(TopkBuffer::kCutoff, plan.chunk, sizeof(float));
  needs(TopkBuffer::kFound, plan.chunk, sizeof(unsigned long long));
  return plan;
}

const char* cosine_topk(const CosineTopkArgs& args) {
  if (args.queries == 0) return nullptr;
  const CosineTopkPlan& plan = args.plan;
  auto* non_finite_rows = buffer<unsigned long long>(args, TopkBuffer::kNonFiniteRows);
  auto* query_unit = buffer<float>(args, TopkBuffer::kQueryUnit);
  auto* query_norm = buffer<double>(args, TopkBuffer::kQueryNorm);
  auto* query_error_bound = buffer<float>(args, TopkBuffer::kQueryErrorBound);
  auto* query_code = buffer<__nv_bfloat16>(args, TopkBuffer::kQueryCode);
  auto* row_norm = buffer<double>(args, TopkBuffer::kRowNorm);
  auto* row_error_bound = buffer<float>(args, TopkBuffer::kRowErrorBound);
  auto* row_code = buffer<__nv_bfloat16>(args, TopkBuffer::kRowCode);
  const int64_t depth = ceil_div(args.d, kTileDepth) * kTileDepth;
  const auto prepare = [&](auto kernel, const RowsParams& rows) {
    return launch_kernel(kernel, blocks_for(rows.n, kRowThreads / kPartials), kRowThreads, 0, args.stream, rows);
  };
  const char* error =
      prepare(prepare_rows<true>, {args.query, args.query_stride, args.queries, args.d, plan.pitch, depth, query_code,
                                   query_norm, query_error_bound, query_unit, non_finite_rows});
  if (!error && args.n > 0)
    error = prepare(prepare_rows<false>, {args.gallery, args.gallery_stride, args.n, args.d, plan.pitch, depth,
                                          row_code, row_norm, row_error_bound, nullptr, non_finite_rows});
  for (int64_t first = 0; !error && first < args.queries; first += plan.chunk) {
    const int64_t queries = args.queries - first < plan.chunk ? args.queries - first : plan.chunk;
    auto* found = buffer<unsigned long long>(args, TopkBuffer::kFound);
    auto* list = buffer<Candidate>(args, TopkBuffer::kList);
    if (plan.first_pass) {
      auto* best = buffer<float>(args, TopkBuffer::kBest);
      auto* cutoff = buffer<float>(args, TopkBuffer::kCutoff);
      const TilesParams tiles{query_code + first * plan.pitch,
                              row_code,
                              query_error_bound + first,
                              row_error_bound,
                              queries,
                              args.n,
                              plan.pitch,
                              plan.splits,
                              best,
                              cutoff,
                              found,
                              list,
                              plan.capacity};
      const int64_t blocks = blocks_for(ceil_div(queries, kTile) * plan.splits, 1);
      error = launch_kernel(sweep_tiles<false>, blocks, kTileThreads, 0, args.stream, tiles);
      if (!error)
        error = launch_kernel(find_cutoffs<kSelectThreads>, blocks_for(queries, 1), kSelectThreads, 0, args.stream,
                              CutoffParams{best, cutoff, found, queries, plan.splits * kTile, args.k});
      if (!error) error = launch_kernel(sweep_tiles<true>, blocks, kTileThreads, 0, args.stream, tiles);
    }
    if (!error)
      error = launch_kernel(
          finish_topk<kSelectThreads>, blocks_for(queries, 1), kSelectThreads, 0, args.stream,
          FinishParams{query_unit + first * args.d, query_norm + first, args.gallery, args.gallery_stride, row_norm,
                       non_finite_rows, plan.first_pass ? found : nullptr, list, plan.capacity, queries, args.n, args.d,
                       args.k, args.scores + first * args.k, args.ids + first * args.k});
  }
  return error;
}

}  // namespace simplexfix::cuda
