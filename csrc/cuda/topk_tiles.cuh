// The first pass of the search: products of queries and gallery rows in bfloat16 by tensor cores, in two
// sweeps over the same tiles.
//
// Bucket b holds the gallery rows b, b + buckets, b + 2 buckets, ...  Sweep 1 finds for each query the
// best score that some row of each bucket certainly has.  The k-th best of those, the cutoff, is reached
// by k rows for certain; neighbours in the gallery, which are often of one class, lie in different
// buckets.  Sweep 2 lists every row that may reach the cutoff.  A list that is full goes on counting.
//
// Work:    a block of 128 does a tile of 64 queries with a split of the gallery at a time: every
//          splits-th tile of 64 rows, 64 buckets.  A warp has 32 x 32 products in its registers; panels
//          of 32 columns come by cp.async, the next one while this one is multiplied.
// Memory:  (queries / 64) times the gallery's codes, twice, mostly from L2: blocks of one split follow
//          each other.  Shared: 20 KiB.
// Numerics: core/cosine_score.h: nothing that the bits of these products decide is lost.
// Determinism: the lists' order depends on timing, what is in them on the sums' rounding alone.
// Budget:  128 registers, so 512 threads an SM or more.  No local memory.
#pragma once
#include "../core/ranking.h"
#include "team.cuh"

namespace simplexfix::cuda {

constexpr int kTile = 64;       // queries and gallery rows
constexpr int kTileDepth = 32;  // columns of a panel
constexpr int kTileThreads = 128;

struct TilesParams {
  const __nv_bfloat16 *query_code, *row_code;  // [queries, pitch], [n, pitch], 16-byte aligned
  const float *query_error_bound, *row_error_bound;
  int64_t queries, n, pitch;
  int64_t splits;  // at most the number of tiles of rows
  float* best;     // sweep 1: [queries, splits * kTile], -inf where a bucket is empty
  const float* cutoff;
  unsigned long long* found;  // [queries] rows that may reach the cutoff
  Candidate* list;            // [queries, capacity], the ids of the first of them
  int64_t capacity;
};

struct alignas(16) TilePanels {
  __nv_bfloat16 query[kTile][kTileDepth + 8], row[kTile][kTileDepth + 8];  // 80 bytes: eight rows in different banks
};

__device__ __forceinline__ void copy_panel(__nv_bfloat16 (*s_to)[kTileDepth + 8], const __nv_bfloat16* g_from,
                                           int64_t first, int64_t rows, int64_t column, int64_t pitch) {
  constexpr int kPieces = kTileDepth / 8;
  SIMPLEXFIX_UNROLL for (int turn = 0; turn < kTile * kPieces / kTileThreads; ++turn) {
    const int piece = turn * kTileThreads + int(threadIdx.x), row = piece / kPieces, at = piece % kPieces * 8;
    const bool inside = first + row < rows && column + at < pitch;  // zeros elsewhere
    copy_async(&s_to[row][at], inside ? g_from + (first + row) * pitch + column + at : g_from, inside ? 16 : 0);
  }
}

// A warp's products: fragments of 16 queries and 8 rows, number f of queries f / 4 and rows f % 4.
struct WarpTile {
  float sums[8][4];

  // Where the lane's number e of fragment f lies in the block's tile.
  __device__ static int query(int f, int e) { return query0() + f / 4 * 16 + lane() / 4 + e / 2 * 8; }
  __device__ static int row(int f, int e) { return row0() + f % 4 * 8 + lane() % 4 * 2 + e % 2; }
  __device__ static int query0() { return int(threadIdx.x) / 32 % 2 * 32; }
  __device__ static int row0() { return int(threadIdx.x) / 64 * 32; }
  __device__ static int lane() { return int(threadIdx.x) % 32; }

  __device__ void add(const TilePanels& s_panels) {
    SIMPLEXFIX_UNROLL for (int k = 0; k < kTileDepth; k += 16) {
      uint32_t a[2][4], b[2][4];
      SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i) {
        ldmatrix(a[i], &s_panels.query[query0() + i * 16 + lane() % 16][k + lane() / 16 * 8]);
        ldmatrix(b[i], &s_panels.row[row0() + i * 16 + lane() / 16 * 8 + lane() % 8][k + lane() / 8 % 2 * 8]);
      }
      SIMPLEXFIX_UNROLL for (int f = 0; f < 8; ++f) {
        const uint32_t (&rows)[4] = b[f % 4 / 2];
        mma<__nv_bfloat16>(sums[f], a[f / 4], {rows[f % 2 * 2], rows[f % 2 * 2 + 1]});
      }
    }
  }
};

template <bool kLists>
__global__ void __launch_bounds__(kTileThreads, 4) sweep_tiles(const TilesParams p) {
  SIMPLEXFIX_SHARED(s_panels, TilePanels[2]);
  const int64_t query_tiles = (p.queries + kTile - 1) / kTile, row_tiles = (p.n + kTile - 1) / kTile;
  const int64_t panels = (p.pitch + kTileDepth - 1) / kTileDepth;
  for (int64_t work = blockIdx.x; work < query_tiles * p.splits; work += gridDim.x) {
    const int64_t query0 = work % query_tiles * kTile, split = work / query_tiles;
    const auto load = [&](int64_t tile, int64_t panel, int into) {
      if (tile < row_tiles) {
        copy_panel(s_panels[into].query, p.query_code, query0, p.queries, panel * kTileDepth, p.pitch);
        copy_panel(s_panels[into].row, p.row_code, tile * kTile, p.n, panel * kTileDepth, p.pitch);
      }
      commit_copies();
    };
    float least[4], best[8][4];  // the least product + row bound that passes; the best product - row bound
    SIMPLEXFIX_UNROLL for (int i = 0; i < 4; ++i) {
      const int64_t query = query0 + WarpTile::query(i / 2 * 4, i % 2 * 2);
      least[i] = kLists && query < p.queries ? p.cutoff[query] - p.query_error_bound[query] : INFINITY;
    }
    SIMPLEXFIX_UNROLL for (int i = 0; i < 32; ++i) best[i / 4][i % 4] = -INFINITY;
    load(split, 0, 0);
    int now = 0;
    for (int64_t tile = split; tile < row_tiles; tile += p.splits) {
      WarpTile products{};
      for (int64_t panel = 0; panel < panels; ++panel) {
        const bool last = panel + 1 == panels;
        load(last ? tile + p.splits : tile, last ? 0 : panel + 1, 1 - now);
        wait_for_copies<1>();
        sync_team<kTileThreads>();  // every thread's copies of this panel are there
        products.add(s_panels[now]);
        sync_team<kTileThreads>();  // all have read it: the next turn's copies go there
        now = 1 - now;
      }
      SIMPLEXFIX_UNROLL for (int i = 0; i < 8; ++i) {  // a row's products side by side
        const int64_t row = tile * kTile + WarpTile::row(i / 2, i % 2);
        if (row >= p.n) continue;
        const float row_error_bound = p.row_error_bound[row];
        SIMPLEXFIX_UNROLL for (int j = 0; j < 4; ++j) {
          const int f = i / 2 + j / 2 * 4, e = i % 2 + j % 2 * 2;
          const float product = products.sums[f][e];
          if constexpr (kLists) {
            if (!(product + row_error_bound >= least[j])) continue;
            const int64_t query = query0 + WarpTile::query(f, e);
            const auto place = int64_t(atomicAdd(p.found + query, 1ull));
            if (place < p.capacity) p.list[query * p.capacity + place].id = row;
          } else {
            best[f][e] = product - row_error_bound > best[f][e] ? product - row_error_bound : best[f][e];
          }
        }
      }
    }
    if constexpr (!kLists) {
      SIMPLEXFIX_UNROLL for (int i = 0; i < 32; ++i) {
        const int f = i / 4, e = i % 4;
        const int64_t query = query0 + WarpTile::query(f, e), bucket = split * kTile + WarpTile::row(f, e);
        if (query < p.queries) p.best[query * p.splits * kTile + bucket] = best[f][e] - p.query_error_bound[query];
      }
    }
  }
}

}  // namespace simplexfix::cuda
