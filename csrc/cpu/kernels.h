// The CPU kernels: a table of functions for each instruction set, one of which is in use.
// Every function does the rows [begin, end) alone, so callers may split the rows as they like:
// no result depends on the split.
#pragma once
#include <cstdint>

#include "../core/cross_entropy.h"
#include "../core/simplex.h"
#include "../core/types.h"

namespace simplexfix::cpu {

const char* isa();  // "base", "avx2", "avx512" or "avx512bf16": what this machine runs; SIMPLEXFIX_ISA lowers it

// Of every polytope with K slots.
template <typename T>
struct CrossEntropyArgs {
  using Number = T;
  using A = accumulate_t<T>;
  const T* z;  // [B, d], rows z_stride elements apart
  int64_t z_stride;
  const int64_t* target;  // [B], each a slot in [0, K) or ignore_index
  const A* weight;        // [K] or nullptr
  A* loss;                // [B], of each row; 0 where ignored
  T* gradient;            // [B, d] contiguous, or nullptr where none is wanted
  int64_t d;
  int64_t ignore_index;
  bool streams;  // writes the gradient past the caches: the same bits
  A upstream;    // multiplies every row's gradient
  CrossEntropyOptions<A> options;
};

template <typename T>
struct CubeCrossEntropyArgs : CrossEntropyArgs<T> {
  const int64_t* codes;  // [K, words], bit j % 64 of word j / 64 set where coordinate j is positive; or nullptr:
  int64_t words;         // the target is the code itself, of d <= 62 bits
};

template <typename T>
struct LogitsArgs {
  using A = accumulate_t<T>;
  const T* z;  // [B, d], rows z_stride elements apart
  int64_t z_stride;
  const T* logits_gradient;  // [B, d + 1] contiguous, backward only
  T* out;                    // forward: logits [B, d + 1]; backward: dL/dz [B, d]
  int64_t d;
  bool normalize;
  A scale;
  Simplex simplex;
};

template <typename T>
struct Kernels {
  void (*simplex_cross_entropy)(const CrossEntropyArgs<T>&, int64_t begin, int64_t end);
  void (*orthoplex_cross_entropy)(const CrossEntropyArgs<T>&, int64_t begin, int64_t end);
  void (*cube_cross_entropy)(const CubeCrossEntropyArgs<T>&, int64_t begin, int64_t end);
  void (*simplex_logits)(const LogitsArgs<T>&, int64_t begin, int64_t end);
  void (*simplex_logits_backward)(const LogitsArgs<T>&, int64_t begin, int64_t end);
  void (*scale_rows)(const T* in, const accumulate_t<T>* factor, int64_t factor_stride, T* out, int64_t cols,
                     int64_t begin, int64_t end);
};

// Exact cosine search: docs/numerics.md. Scores are fp64 sums in one fixed order, rounded to fp32.
struct SearchKernels {
  // out = in / |in| rounded to float, a zero row stays zero
  void (*normalize_rows)(const float* in, int64_t in_stride, float* out, int64_t d, int64_t begin, int64_t end);
  // scores[i * scores_stride + j] = query i . row j
  void (*dot_tile)(const float* query, int64_t queries, const float* rows, int64_t n, int64_t d, float* scores,
                   int64_t scores_stride);
};

template <typename T>
const Kernels<T>& kernels();
const SearchKernels& search_kernels();

}  // namespace simplexfix::cpu
