// The first pass of the search: products of queries and gallery rows in bfloat16 by tensor cores, in two
// sweeps over the same tiles.
//
// Bucket b holds the gallery rows b, b + buckets, b + 2 buckets, ...  Sweep 1 finds for each query the
// best score that some row of each bucket certainly has.  The k-th best of those, the cutoff, is reached
// by k rows for certain; neighbours in the gallery, which are often of one class, lie in different
// buckets.  Sweep 2 lists every row that may reach the cutoff.  A list that is full goes on counting.
//
// Work:    a block of 128 does a tile of 64 queries with a stretch of the gallery at a time: every
//          stretches-th tile of 64 rows, 64 buckets.  A warp has 32 x 32 products in its registers; panels
//          of 32 columns come by cp.async, the next one while this one is multiplied.
// Memory:  (queries / 64) times the gallery's codes, twice, mostly from L2: blocks of one stretch follow
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
  const float *query_room, *row_room;
  int64_t queries, n, pitch;
  int64_t stretches;  // at most the number of tiles of rows
  float* best;        // sweep 1: [queries, stretches * kTile], -inf where a bucket is empty
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

// A warp's products: 2 x 4 fragments of 16 queries and 8 rows.
struct WarpTile {
  float sums[2][4][4];

  __device__ void clear() {
    SIMPLEXFIX_UNROLL for (auto& i : sums) SIMPLEXFIX_UNROLL for (auto& j : i) SIMPLEXFIX_UNROLL for (float& x : j) x =
        0;
  }
  // The lane's numbers within the block's tile: query of sums[i][.][e], row of sums[.][j][e].
  __device__ static int query(int i, int e) { return int(threadIdx.x) / 32 % 2 * 32 + i * 16 + lane() / 4 + e / 2 * 8; }
  __device__ static int row(int j, int e) { return int(threadIdx.x) / 64 * 32 + j * 8 + lane() % 4 * 2 + e % 2; }
  __device__ static int lane() { return int(threadIdx.x) % 32; }

  __device__ void add(const TilePanels& s_panels) {
    const int query0 = int(threadIdx.x) / 32 % 2 * 32, row0 = int(threadIdx.x) / 64 * 32;
    SIMPLEXFIX_UNROLL for (int k = 0; k < kTileDepth; k += 16) {
      uint32_t a[2][4], b[2][4];
      SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i)
          ldmatrix(a[i], &s_panels.query[query0 + i * 16 + lane() % 16][k + lane() / 16 * 8]);
      SIMPLEXFIX_UNROLL for (int j = 0; j < 2; ++j)
          ldmatrix(b[j], &s_panels.row[row0 + j * 16 + lane() % 8 + lane() / 16 * 8][k + lane() / 8 % 2 * 8]);
      SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i) SIMPLEXFIX_UNROLL for (int j = 0; j < 4; ++j)
          mma<__nv_bfloat16>(sums[i][j], a[i], {b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]});
    }
  }
};

template <bool kLists>
__global__ void __launch_bounds__(kTileThreads, 4) sweep_tiles(const TilesParams p) {
  SIMPLEXFIX_SHARED(s_panels, TilePanels[2]);
  const int64_t query_tiles = (p.queries + kTile - 1) / kTile, row_tiles = (p.n + kTile - 1) / kTile;
  const int64_t panels = (p.pitch + kTileDepth - 1) / kTileDepth;
  for (int64_t work = blockIdx.x; work < query_tiles * p.stretches; work += gridDim.x) {
    const int64_t query0 = work % query_tiles * kTile, stretch = work / query_tiles;
    const auto load = [&](int64_t tile, int64_t panel, int into) {
      if (tile < row_tiles) {
        copy_panel(s_panels[into].query, p.query_code, query0, p.queries, panel * kTileDepth, p.pitch);
        copy_panel(s_panels[into].row, p.row_code, tile * kTile, p.n, panel * kTileDepth, p.pitch);
      }
      commit_copies();
    };
    float room[2][2], cutoff[2][2], best[2][4][4];
    SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i) SIMPLEXFIX_UNROLL for (int e = 0; e < 2; ++e) {
      const int64_t query = query0 + WarpTile::query(i, 2 * e);
      room[i][e] = query < p.queries ? p.query_room[query] : 0.f;
      cutoff[i][e] = kLists && query < p.queries ? p.cutoff[query] : INFINITY;
      SIMPLEXFIX_UNROLL for (int j = 0; j < 4; ++j) best[i][j][2 * e] = best[i][j][2 * e + 1] = -INFINITY;
    }
    load(stretch, 0, 0);
    int now = 0;
    for (int64_t tile = stretch; tile < row_tiles; tile += p.stretches) {
      WarpTile products;
      products.clear();
      for (int64_t panel = 0; panel < panels; ++panel) {
        const bool last = panel + 1 == panels;
        load(last ? tile + p.stretches : tile, last ? 0 : panel + 1, 1 - now);
        wait_for_copies<1>();
        sync_team<kTileThreads>();  // every thread's copies of this panel are there
        products.add(s_panels[now]);
        sync_team<kTileThreads>();  // all have read it: the next turn's copies go there
        now = 1 - now;
      }
      SIMPLEXFIX_UNROLL for (int j = 0; j < 4; ++j) SIMPLEXFIX_UNROLL for (int odd = 0; odd < 2; ++odd) {
        const int64_t row = tile * kTile + WarpTile::row(j, odd);
        if (row >= p.n) continue;
        const float row_room = p.row_room[row];
        SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i) SIMPLEXFIX_UNROLL for (int e = 0; e < 2; ++e) {
          const float product = products.sums[i][j][2 * e + odd], within = room[i][e] + row_room;
          float& most = best[i][j][2 * e + odd];
          if constexpr (kLists) {
            if (!(product + within >= cutoff[i][e])) continue;
            const int64_t query = query0 + WarpTile::query(i, 2 * e);
            const auto place = int64_t(atomicAdd(p.found + query, 1ull));
            if (place < p.capacity) p.list[query * p.capacity + place].id = row;
          } else {
            most = product - within > most ? product - within : most;
          }
        }
      }
    }
    if constexpr (!kLists)
      SIMPLEXFIX_UNROLL for (int i = 0; i < 2; ++i) SIMPLEXFIX_UNROLL for (int j = 0; j < 4; ++j)
          SIMPLEXFIX_UNROLL for (int e = 0; e < 4; ++e) {
        const int64_t query = query0 + WarpTile::query(i, e);
        if (query < p.queries)
          p.best[query * p.stretches * kTile + stretch * kTile + WarpTile::row(j, e)] = best[i][j][e];
      }
  }
}

}  // namespace simplexfix::cuda
