// The CPU kernels: one table of functions for each instruction set, of which one is in use. Every function computes the
// rows [begin, end) independently of other rows. So callers may split the rows in any way without changing a result.
#pragma once
#include <cstdint>
#include <vector>

#include "../core/cross_entropy.h"
#include "../core/simplex.h"
#include "../core/types.h"

namespace simplexfix::cpu {

// Returns the instruction set in use: "base", "avx2", "avxvnni", "avx512", "avx512vnni" or "avx512bf16"; on aarch64
// "base", "dotprod" or "i8mm". It is the newest that the machine supports, unless SIMPLEXFIX_ISA lowers it.
const char* isa();
const std::vector<const char*>& isa_levels();  // all names, from the lowest

// Arguments of the cross-entropy of any polytope with K slots.
template <typename T>
struct CrossEntropyArgs {
  using Number = T;
  using A = accumulate_t<T>;
  const T* z;  // [B, d], rows z_stride elements apart
  int64_t z_stride;
  const int64_t* target;  // [B], each a slot in [0, K) or ignore_index
  const A* weight;        // [K] or nullptr
  A* loss;                // [B], of each row; 0 for ignored rows
  T* gradient;            // [B, d] contiguous, or nullptr if no gradient is requested
  int64_t d;
  int64_t ignore_index;
  bool non_temporal;  // write the gradient with non-temporal stores; the bits are the same
  A upstream;         // factor of every row's gradient
  CrossEntropyOptions<A> options;
};

template <typename T>
struct CubeCrossEntropyArgs : CrossEntropyArgs<T> {
  // [K, words]; bit j % 64 of word j / 64 is set if coordinate j is positive. nullptr: the target itself is the code,
  // of d <= 62 bits.
  const int64_t* codes;
  int64_t words;
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

// Class indices have the width of the scores that they mask, so that vectors of both have equally many lanes.
template <typename A>
using ClassIndex = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;

template <typename A>
struct ContrastArgs {
  // [rows, candidates]; on entry the dot products of features, on return the loss's derivatives with respect to them
  A* similarity;
  int64_t candidates;
  const ClassIndex<A>*anchor_class, *candidate_class;
  const A *anchor_scale, *candidate_scale;  // 1 / norm
  A mu;                                     // factor of the cosines, an inverse temperature
  Negatives negatives;
  int64_t first_positive;  // candidate first_positive + i is row i's own
  A* loss;                 // [rows]
  const A* upstream;       // [rows], or nullptr if no derivatives are requested
};

// The rows of a matrix A [m, k], or the columns of a matrix B [k, n], as packing reads them.
template <typename T>
struct PanelView {
  const T* first;
  // stride: elements from one row of A (column of B) to the next. k_stride: elements from one k to the next. One of
  // them is 1.
  int64_t stride, k_stride;

  PanelView from(int64_t i, int64_t k) const { return {first + i * stride + k * k_stride, stride, k_stride}; }
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
  void (*contrast_rows)(const ContrastArgs<accumulate_t<T>>&, int64_t begin, int64_t end);
  void (*inverse_norms)(const T* z, int64_t z_stride, int64_t d, accumulate_t<T>* out, int64_t begin, int64_t end);
  // out = gradient - z (z . gradient) / |z|^2, where gradient already has the factor 1 / |z|; may be in place.
  void (*project_rows)(const T* z, int64_t z_stride, const accumulate_t<T>* gradient,
                       const accumulate_t<T>* inverse_norm, int64_t d, T* out, int64_t begin, int64_t end);
  // For matrix products (matrix_product.h): panel[k][i] = element (i, k) of the view, zero for i >= count.
  void (*pack_a)(PanelView<T> view, int64_t count, int64_t depth, accumulate_t<T>* panel);
  void (*pack_b)(PanelView<T> view, int64_t count, int64_t depth, accumulate_t<T>* panel);
  // out[row][column] = sum over k of a[k][row] b[k][column]; += if add
  void (*multiply_tile)(const accumulate_t<T>* a, const accumulate_t<T>* b, int64_t depth, accumulate_t<T>* out,
                        int64_t out_stride, int64_t rows, int64_t columns, bool add);
  int tile_rows, tile_columns;  // rows of a panel of A, columns of a panel of B
};

// Summary of a coded vector x = scale * codes + residual.
struct CodeSummary {
  float scale;
  int64_t sum;        // sum of the codes
  double norm;        // |x|
  double code_norm;   // |scale * codes|
  double residual;    // |x - scale * codes|
  double center_dot;  // center . x
};

// 64 gallery rows in codes (gallery_codes.h).
constexpr int64_t kPanelRows = 64;
struct CodePanel {
  const uint8_t* codes;                 // [groups][kPanelRows][4]
  const float *scale, *offset, *error;  // [kPanelRows], terms of the bound that codes.inc states
};

// Limits of a query's codes below which no sum of the first pass overflows. Four codes are a group, and run_groups
// consecutive groups are a run. The first pass may add up a run in lanes of 16 bits: one lane for codes 0 and 1 of all
// groups, and one for codes 2 and 3.
struct CodeLimits {
  int pair;        // largest sum of the two magnitudes of one group in a lane
  int run;         // largest sum of all magnitudes of one run in a lane
  int run_groups;  // groups per run
};

// Queries in codes, with their cutoffs for one panel.
struct CodeQueries {
  const int8_t* codes;  // [n][stride], in groups of four
  int64_t stride, n;
  // Initial values of the sums: -128 times the sum of a query's codes, which cancels the panel's offset of 128.
  // run_start [n][runs] has them for each whole run, in two lanes of 16 bits that wrap around, and start [n] for the
  // codes after the last whole run. Without runs (run_groups is 1) run_start is empty, and start is for all codes.
  const int32_t *start, *run_start;
  const float *scale, *norm, *cutoff;  // [n]
};

// The format of a gallery's rows.
enum class RowType : int { kFloat, kBFloat16 };
inline int64_t row_bytes(RowType type, int64_t d) { return d * (type == RowType::kFloat ? 4 : 2); }

// Scores of fp32 queries with rows of one type: fp64 sums in one fixed order, rounded to fp32.
struct DotKernels {
  // scores[i * scores_stride + j] = query i . row j
  void (*tile)(const float* query, int64_t queries, const void* rows, int64_t n, int64_t d, float* scores,
               int64_t scores_stride);
  // scores[j] = query . rows[j], rows at any addresses
  void (*scattered)(const float* query, const void* const* rows, int64_t n, int64_t d, float* scores);
};

// Exact cosine search: docs/design/numerics.md.
struct SearchKernels {
  // out = in / |in| rounded to float; a zero row stays zero
  void (*normalize_rows)(const float* in, int64_t in_stride, float* out, int64_t d, int64_t begin, int64_t end);
  DotKernels dot[2];  // by RowType
  // Encodes row - center with codes in [-range, range].
  CodeSummary (*encode)(const float* row, const float* center, int64_t d, int range, int8_t* codes);
  // Writes the upper bounds to upper [n, kPanelRows]. Bit r of passed[q] is set if the bound of query q and row r
  // reaches the query's cutoff.
  void (*scan_panel)(const CodePanel& panel, const CodeQueries& queries, int64_t groups, uint64_t* passed,
                     float* upper);
  CodeLimits limits;
};

template <typename T>
const Kernels<T>& kernels();
const SearchKernels& search_kernels();

}  // namespace simplexfix::cpu
