// The old/new contrast on the CPU, in blocks of anchors. A block takes two matrix products (matrix_product.h) with the
// kernel of contrast.inc between them.
//
// Features are not normalised beforehand: norms enter as factors of rows and columns. Memory besides the results: one
// block of similarities (kBlockNumbers, or kMinBlock rows if these are more) and the chunks of the products.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"
#include "matrix_product.h"

namespace simplexfix::cpu {

template <typename T>
struct OldNewContrast {
  using A = accumulate_t<T>;
  const T *anchors, *candidates;            // [rows, d], [count, d]
  int64_t anchor_stride, candidate_stride;  // elements from one row to the next
  const int64_t *anchor_class, *candidate_class;
  int64_t rows, count, d;
  int64_t first_positive;  // candidate first_positive + i is anchor i's own
  A mu;
  Negatives negatives;
  A* loss;            // [rows]
  const A* upstream;  // [rows]: dL/d(loss), or nullptr if no gradient is requested
  bool to_anchors;    // the gradient is with respect to the anchors if true, else to the candidates
  A* grad_unit;       // dL/d(z / |z|) times 1 / |z|, shaped like the gradient; may be the gradient itself
  T* gradient;        // dL/dz, contiguous
};

// Returns classes as indices into the candidates' sorted classes, -1 for an anchor's class that no candidate has.
template <typename A>
std::vector<ClassIndex<A>> class_indices(const int64_t* classes, int64_t n, const std::vector<int64_t>& sorted) {
  std::vector<ClassIndex<A>> indices(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) {
    const auto found = std::lower_bound(sorted.begin(), sorted.end(), classes[i]);
    const bool known = found != sorted.end() && *found == classes[i];
    indices[size_t(i)] = known ? ClassIndex<A>(found - sorted.begin()) : ClassIndex<A>(-1);
  }
  return indices;
}

// split(count, numbers, work) is as in MatrixProduct.
template <typename T, typename Split>
void old_new_contrast(const OldNewContrast<T>& args, const Split& split) {
  using A = accumulate_t<T>;
  constexpr int64_t kBlockNumbers = int64_t(1) << 22;
  // rows; smaller blocks make slow products, larger ones are no faster
  constexpr int64_t kMinBlock = 32, kMaxBlock = 512;
  const auto& [anchors, candidates, anchor_stride, candidate_stride, anchor_class, candidate_class, n, count, d,
               first_positive, mu, negatives, loss, upstream, to_anchors, grad_unit, gradient] = args;
  const auto inverse_norms = [&](const T* z, int64_t stride, int64_t rows) {
    std::vector<A> out(static_cast<size_t>(rows));
    split(rows, d,
          [&](int64_t begin, int64_t end) { kernels<T>().inverse_norms(z, stride, d, out.data(), begin, end); });
    return out;
  };

  std::vector<int64_t> sorted(candidate_class, candidate_class + count);
  std::sort(sorted.begin(), sorted.end());
  sorted.erase(std::unique(sorted.begin(), sorted.end()), sorted.end());
  const auto anchor_index = class_indices<A>(anchor_class, n, sorted);
  const auto candidate_index = class_indices<A>(candidate_class, count, sorted);
  const auto anchor_scale = inverse_norms(anchors, anchor_stride, n);
  const auto candidate_scale = inverse_norms(candidates, candidate_stride, count);
  const int64_t side_rows = to_anchors ? n : count;
  if (upstream && n == 0) std::fill_n(grad_unit, side_rows * d, A(0));  // without anchors the candidates' gradient is 0

  const int64_t block = std::clamp(kBlockNumbers / std::max<int64_t>(1, count), kMinBlock, kMaxBlock);
  const AlignedArray<A> similarity = aligned_array<A>(size_t(std::min(block, n) * count));
  A* const s = similarity.get();
  MatrixProduct<A> product;
  for (int64_t first = 0; first < n; first += block) {
    const int64_t rows = std::min(block, n - first);
    const T* block_anchors = anchors + first * anchor_stride;
    product(rows, count, d, PanelView<T>{block_anchors, anchor_stride, 1},
            PanelView<T>{candidates, candidate_stride, 1}, s, count, false, split);
    const ContrastArgs<A> block_args{.similarity = s,
                                     .candidates = count,
                                     .anchor_class = anchor_index.data() + first,
                                     .candidate_class = candidate_index.data(),
                                     .anchor_scale = anchor_scale.data() + first,
                                     .candidate_scale = candidate_scale.data(),
                                     .mu = mu,
                                     .negatives = negatives,
                                     .first_positive = first_positive + first,
                                     .loss = loss + first,
                                     .upstream = upstream ? upstream + first : nullptr};
    split(rows, count, [&](int64_t begin, int64_t end) { kernels<T>().contrast_rows(block_args, begin, end); });
    if (!upstream) continue;
    if (to_anchors)
      product(rows, d, count, PanelView<A>{s, count, 1}, PanelView<T>{candidates, 1, candidate_stride},
              grad_unit + first * d, d, false, split);
    else
      product(count, d, rows, PanelView<A>{s, 1, count}, PanelView<T>{block_anchors, 1, anchor_stride}, grad_unit, d,
              first > 0, split);
  }
  if (!upstream) return;
  split(side_rows, d, [&](int64_t begin, int64_t end) {
    if (to_anchors)
      kernels<T>().project_rows(anchors, anchor_stride, grad_unit, anchor_scale.data(), d, gradient, begin, end);
    else
      kernels<T>().project_rows(candidates, candidate_stride, grad_unit, candidate_scale.data(), d, gradient, begin,
                                end);
  });
}

}  // namespace simplexfix::cpu
