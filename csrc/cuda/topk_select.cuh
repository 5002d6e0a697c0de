// The last steps of the search: cutoffs from the results of the first sweep, and results from the lists.
//
// find_cutoffs: a block per query finds the k-th largest of the query's buckets by radix select, 8 bits at a time.
// finish_topk:  a block per query scores the candidates, sorts them and writes the best k. The candidates are the
// query's
//               list. Without a first pass, or if more rows passed than a list holds, they are all rows of the gallery:
//               slower, still exact. Then the list holds the best so far and new candidates; whenever it is full, it is
//               cut to the best k.
//
// Memory:  finish_topk reads 4 d bytes for each row that it scores; lists are sorted in place (L2).
// Numerics: core/cosine_score.h: a score has the same bits as on the CPU.
// Determinism: atomics fill the lists in an order that depends on timing. Sorting removes it, because the order of
//              results is total.
// Budget:  80 registers, so at least 768 threads per SM; 1 KiB of shared memory, no local memory.
#pragma once
#include <cstring>

#include "../core/cosine_score.h"
#include "../core/ranking.h"
#include "topk_rows.cuh"

namespace simplexfix::cuda {

constexpr int kSelectThreads = 256;

// Maps a float to bits that compare as unsigned integers in the same order.
__device__ __forceinline__ uint32_t ordered_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered_bits(uint32_t bits) {
  bits = bits & 0x80000000u ? bits ^ 0x80000000u : ~bits;
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

struct CutoffParams {
  const float* best;          // [queries, buckets], buckets >= k
  float* cutoff;              // [queries]
  unsigned long long* found;  // [queries], set to 0 for the following sweep
  int64_t queries, buckets, k;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads) find_cutoffs(const CutoffParams p) {
  static_assert(kThreads == 256, "a thread for each value of a digit");
  SIMPLEXFIX_SHARED(s_counts, unsigned[256]);
  for (int64_t query = blockIdx.x; query < p.queries; query += gridDim.x) {
    const float* best = p.best + query * p.buckets;
    uint32_t prefix = 0;
    int64_t rank = p.k;  // rank of the cutoff among the numbers that begin with prefix
    for (int shift = 24; shift >= 0; shift -= 8) {
      s_counts[threadIdx.x] = 0;
      sync_team<kThreads>();
      for (int64_t b = threadIdx.x; b < p.buckets; b += kThreads) {
        const uint64_t bits = ordered_bits(best[b]);
        if (bits >> (shift + 8) == prefix) atomicAdd(&s_counts[bits >> shift & 255], 1u);
      }
      sync_team<kThreads>();  // all numbers are counted
      uint32_t digit = 255;
      for (; digit > 0 && rank > int64_t(s_counts[digit]); --digit) rank -= s_counts[digit];
      prefix = prefix << 8 | digit;
      sync_team<kThreads>();  // all threads have read the counts: the next iteration clears them
    }
    if (threadIdx.x == 0) {
      p.cutoff[query] = from_ordered_bits(prefix);
      p.found[query] = 0;
    }
  }
}

// Sorts a block's list in place by bitonic sort; its capacity must allow the next power of two.
template <int kThreads>
__device__ __forceinline__ void sort_candidates(Candidate* list, int64_t count) {
  int64_t size = 1;
  while (size < count) size *= 2;
  for (int64_t i = count + int(threadIdx.x); i < size; i += kThreads) list[i] = {-INFINITY, INT64_MAX};
  sync_team<kThreads>();  // the padding and the caller's elements are written
  for (int64_t run = 2; run <= size; run *= 2)
    for (int64_t stride = run / 2; stride > 0; stride /= 2) {
      for (int64_t pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int64_t low = (pair & -stride) * 2 + (pair & (stride - 1));
        const Candidate a = list[low], b = list[low + stride];
        if ((low & run) == 0 ? ranks_before(b, a) : ranks_before(a, b)) {
          list[low] = b;
          list[low + stride] = a;
        }
      }
      sync_team<kThreads>();  // other threads read these pairs next
    }
}

struct FinishParams {
  const float* query_unit;  // [queries, d]
  const double* query_norm;
  const float* gallery;  // [n, d], gallery_stride elements apart
  int64_t gallery_stride;
  const double* gallery_norm;
  const unsigned long long* non_finite_rows;  // number of gallery rows with nan or inf
  const unsigned long long* found;            // rows that passed the first pass; nullptr without one
  Candidate* list;                            // [queries, capacity]
  int64_t capacity;                           // a power of two, above min(k, n)
  int64_t queries, n, d, k;
  float* scores;  // [queries, k]
  int64_t* ids;
};

template <int kThreads>
__global__ void __launch_bounds__(kThreads, 3) finish_topk(const FinishParams p) {
  SIMPLEXFIX_SHARED(s_count, unsigned long long);
  const int thread = int(threadIdx.x);
  for (int64_t query = blockIdx.x; query < p.queries; query += gridDim.x) {
    const float* q = p.query_unit + query * p.d;
    Candidate* list = p.list + query * p.capacity;
    const bool refused = *p.non_finite_rows > 0 || std::isnan(p.query_norm[query]);
    const bool listed = p.found && int64_t(p.found[query]) <= p.capacity;
    const int64_t total = refused ? 0 : listed ? int64_t(p.found[query]) : p.n;
    int64_t best_count = 0;
    Candidate worst{-INFINITY, INT64_MAX};  // only candidates that rank before it can be among the best
    for (int64_t begin = 0; begin < total;) {
      const int64_t rows = total - begin < p.capacity - best_count ? total - begin : p.capacity - best_count;
      if (thread == 0) s_count = (unsigned long long)(best_count);
      sync_team<kThreads>();
      for (int64_t first = thread / 32 * (32 / kPartials); first < rows; first += kThreads / kPartials) {
        const int64_t own = first + thread % 32 / kPartials, at = own < rows ? own : rows - 1;
        const int64_t row = listed ? list[at].id : begin + at;
        const float* g = p.gallery + row * p.gallery_stride;
        const double norm = p.gallery_norm[row];
        double sum = 0;
        for (int64_t j = thread % kPartials; j < p.d; j += kPartials)
          sum += double(q[j]) * double(unit_number(g[j], norm));
        const Candidate candidate{float(total_of_partials(sum)), row};
        if (own >= rows || thread % kPartials != 0) continue;
        if (listed)
          list[own].score = candidate.score;
        else if (ranks_before(candidate, worst))
          list[atomicAdd(&s_count, 1ull)] = candidate;
      }
      sync_team<kThreads>();  // all threads have appended
      const int64_t count = listed ? rows : int64_t(s_count);
      sort_candidates<kThreads>(list, count);
      best_count = count < p.k ? count : p.k;
      if (best_count == p.k) worst = list[p.k - 1];
      begin += rows;
    }
    for (int64_t i = thread; i < p.k; i += kThreads) {
      const bool there = i < best_count;
      p.scores[query * p.k + i] = refused ? NAN : there ? list[i].score : -INFINITY;
      p.ids[query * p.k + i] = there ? list[i].id : -1;
    }
  }
}

}  // namespace simplexfix::cuda
