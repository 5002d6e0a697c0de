// The CUDA launchers that the operators call, declared without CUDA or torch headers. Each launches on the given stream
// of the current device, and returns nullptr or an error message.
#pragma once
#include <cstdint>

#include "../core/cross_entropy.h"
#include "../core/simplex.h"
#include "../core/types.h"

namespace simplexfix::cuda {

enum class DType : int { kFloat, kDouble, kHalf, kBFloat16 };

// In all comments below, "of A" and "of dtype" are types of elements: A is double if dtype is kDouble, else float.
struct CrossEntropyArgs {
  const void* z;  // [rows, d] of dtype, rows z_stride elements apart
  int64_t z_stride;
  const int64_t* target;  // [rows]
  const void* weight;     // [slots] of A, or nullptr
  void* row_loss;         // [rows] of A; loss itself with Reduction::kNone
  void* loss;             // of A: [rows], or one number
  void* gradient;         // [rows, d] of dtype, contiguous, or nullptr
  // of A, or nullptr. If it is given, the kernel writes the divisor of a mean to it, and does not divide the gradient.
  void* divisor;
  double* workspace;  // cross_entropy_workspace() numbers; [0] becomes the divisor of a mean
  int64_t rows, d, slots;
  int64_t ignore_index;
  CrossEntropyOptions<double> options;  // its weight_sum is `slots`; the kernels sum the weights themselves
  Reduction reduction;
  DType dtype;
  void* stream;
};
int64_t cross_entropy_workspace(int64_t rows, int64_t d, DType dtype);
const char* simplex_cross_entropy(const CrossEntropyArgs&);
const char* orthoplex_cross_entropy(const CrossEntropyArgs&);
// codes: [slots, ceil(d / 64)] sign bits, or nullptr if a target is its own code.
const char* cube_cross_entropy(const CrossEntropyArgs&, const int64_t* codes);

// Defined in loss_sums.cu; each cross-entropy launches the first before and the second after its kernel for the rows.
const char* launch_target_sums(const CrossEntropyArgs&);
const char* launch_reduce_loss(const CrossEntropyArgs&);

struct ScaleArgs {
  const void* in;      // [rows, cols] of dtype, contiguous
  const void* factor;  // of A: one, or one per row (factor_stride 0 or 1)
  int64_t factor_stride;
  const void* divisor;  // of A: one divisor of all factors, or nullptr
  void* out;            // [rows, cols]
  int64_t rows, cols;
  DType dtype;
  void* stream;
};
const char* scale_rows(const ScaleArgs&);

struct LogitsArgs {
  const void* z;  // [rows, d] of dtype, rows z_stride elements apart
  int64_t z_stride;
  const void* logits_gradient;  // [rows, d + 1] contiguous, backward only
  void* out;                    // forward [rows, d + 1], backward [rows, d]
  int64_t rows, d;
  bool normalize;
  double scale;
  Simplex simplex;
  DType dtype;
  void* stream;
};
const char* simplex_logits(const LogitsArgs&);
const char* simplex_logits_backward(const LogitsArgs&);

// The steps of old_new_contrast (csrc/ops/old_new_contrast.cpp). A is the accumulating type of dtype.
struct ContrastArgs {
  // [rows, candidates] of A; on entry the dot products of features, on return the loss's derivatives with respect to
  // them
  void* similarity;
  const int64_t *anchor_class, *candidate_class;
  const void *anchor_scale, *candidate_scale;  // of A: 1 / norm
  const void* upstream;                        // [rows] of A, or nullptr if no derivatives are requested
  void* loss;                                  // [rows] of A
  int64_t rows, candidates;
  int64_t first_positive;  // candidate first_positive + i is row i's own
  double mu;
  Negatives negatives;
  DType dtype;
  void* stream;
};
const char* contrast_rows(const ContrastArgs&);

struct NormArgs {
  const void* z;  // [rows, d] of dtype, rows z_stride elements apart
  int64_t z_stride;
  void* out;  // [rows] of A: 1 / |z|, or 0 for a zero row
  int64_t rows, d;
  DType dtype;
  void* stream;
};
const char* inverse_norms(const NormArgs&);

// out = grad_unit - z (z . grad_unit) / |z|^2, where grad_unit already has the factor 1 / |z|.
struct ProjectArgs {
  const void* z;  // [rows, d] of dtype, rows z_stride elements apart
  int64_t z_stride;
  const void* grad_unit;     // [rows, d] of A
  const void* inverse_norm;  // [rows] of A
  void* out;                 // [rows, d] of dtype; may be grad_unit
  int64_t rows, d;
  DType dtype;
  void* stream;
};
const char* project_rows(const ProjectArgs&);

// Exact search. The caller allocates the buffers of the plan, each at a 16-byte boundary.
enum class TopkBuffer : int {
  kQueryUnit,
  kQueryNorm,
  kQueryErrorBound,
  kQueryCode,
  kRowNorm,
  kRowErrorBound,
  kRowCode,
  kNonFiniteRows,
  kBest,
  kCutoff,
  kFound,
  kList,
  kCount
};
constexpr int kTopkBuffers = int(TopkBuffer::kCount);

struct TopkLimits {                    // the tests lower them
  int64_t splits = 128;                // minimum splits of the gallery, so that few queries fill a GPU
  int64_t capacity = 2048;             // minimum capacity of a query's list; a power of two
  int64_t bytes = int64_t(256) << 20;  // approximate limit for buckets and lists
};

struct CosineTopkPlan {
  bool first_pass;   // whether there is a first pass in bfloat16; otherwise every row is scored
  int64_t pitch;     // row length of the codes
  int64_t splits;    // of the gallery
  int64_t capacity;  // of a query's list
  int64_t chunk;     // queries per chunk
  int64_t bytes[kTopkBuffers];
};
CosineTopkPlan plan_cosine_topk(int64_t queries, int64_t n, int64_t d, int64_t k, const TopkLimits& = {});

struct CosineTopkArgs {
  const float *query, *gallery;  // [queries, d], [n, d], rows query_stride and gallery_stride elements apart
  int64_t query_stride, gallery_stride;
  int64_t queries, n, d, k;
  float* scores;  // [queries, k]; nan if the query, or any row of the gallery, has nan or inf
  int64_t* ids;   // [queries, k]; -1 where the score is nan, and past the end of the gallery
  CosineTopkPlan plan;
  void* buffers[kTopkBuffers];
  void* stream;
};
const char* cosine_topk(const CosineTopkArgs&);

}  // namespace simplexfix::cuda
