// The first pass of the search: tensor cores multiply queries and gallery rows in bfloat16, in two sweeps over the same
// tiles.
//
// Bucket b holds the gallery rows b, b + buckets, b + 2 buckets, ... Sweep 1 finds, for each query and bucket, the best
// score that some row of the bucket certainly has. The k-th best of these is the cutoff: k rows certainly reach it.
// Neighbours in the gallery are often of one class; here they are in different buckets. Sweep 2 lists every row that
// may reach the cutoff. When a list is full, rows are still counted.
//
// Work:    a block of 128 threads processes a tile of 64 queries with one split of the gallery at a time. A split is
//          every splits-th tile of 64 rows; it contains 64 buckets. A warp keeps 32 x 32 products in registers.
//          cp.async loads panels of 32 columns, the next one while this one is multiplied.
// Memory:  (queries / 64) times the gallery's codes, twice, mostly from L2: consecutive blocks read the same split.
//          Shared: 20 KiB.
// Numerics: core/cosine_score.h: error bounds cover the rounding of these products, so results do not depend on it.
// Determinism: the order of a list depends on timing. Its content depends only on the rounding of the sums.
// Budget:  128 registers, so at least 512 threads per SM. No local memory.
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
  unsigned long long* found;  // [queries] number of rows that may reach the cutoff
  Candidate* list;            // [queries, capacity], the ids of the first `capacity` of them
  int64_t capacity;
};

struct alignas(16) TilePanels {
  // rows of 80 bytes: eight rows are in different banks
  __nv_bfloat16 query[kTile][kTileDepth + 8], row[kTile][kTileDepth + 8];
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

// A warp's products, in 8 fragments of 16 queries and 8 rows. Fragment f has the queries from 16 (f / 4) on and the
// rows from 8 (f % 4) on, in the warp's part of the tile.
struct WarpTile {
  float sums[8][4];

  // The place of the lane's number e of fragment f in the block's tile.
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
    float least[4], best[8][4];  // least: smallest product + row bound that passes; best: largest product - row bound
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
        sync_team<kTileThreads>();  // all threads' copies of this panel are complete
        products.add(s_panels[now]);
        sync_team<kTileThreads>();  // all threads have read it: the next copies overwrite it
        now = 1 - now;
      }
      SIMPLEXFIX_UNROLL for (int i = 0; i < 8; ++i) {  // products of one row are consecutive
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
