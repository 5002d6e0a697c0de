#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kQueryBlock = 32;
constexpr int64_t kMinSplit = 4096;  // gallery rows that are worth a task of their own
constexpr int64_t kTasks = 64;       // wanted for an even load; more would cost collectors
}  // namespace

int64_t first_non_finite_row(const float* rows, int64_t stride, int64_t d, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t j = 0; j < d; ++j)
      if (!std::isfinite(rows[i * stride + j])) return i;
  return -1;
}

TopK::TopK(int64_t k)
    : k_(k),
      capacity_(size_t(std::max<int64_t>(2 * k, k + 64))),
      worst_{-std::numeric_limits<float>::infinity(), std::numeric_limits<int64_t>::max()} {}

void TopK::offer(const float* scores, int64_t n, int64_t first_id) {
  for (int64_t j = 0; j < n; ++j)
    if (scores[j] >= worst_.score) add({scores[j], first_id + j});
}

void TopK::merge(const TopK& other) {
  for (const Candidate& candidate : other.candidates_) add(candidate);
}

void TopK::add(const Candidate& candidate) {
  if (!ranks_before(candidate, worst_)) return;
  candidates_.push_back(candidate);
  if (candidates_.size() >= capacity_) prune();
}

void TopK::prune() {
  std::nth_element(candidates_.begin(), candidates_.begin() + (k_ - 1), candidates_.end(), ranks_before);
  candidates_.resize(size_t(k_));
  worst_ = candidates_.back();
}

void TopK::write(float* scores, int64_t* ids) {
  const int64_t found = std::min<int64_t>(k_, int64_t(candidates_.size()));
  std::partial_sort(candidates_.begin(), candidates_.begin() + found, candidates_.end(), ranks_before);
  for (int64_t i = 0; i < k_; ++i) {
    scores[i] = i < found ? candidates_[size_t(i)].score : -std::numeric_limits<float>::infinity();
    ids[i] = i < found ? candidates_[size_t(i)].id : -1;
  }
}

TopKSearch::TopKSearch(const float* query, int64_t queries, const float* gallery, int64_t n, int64_t d, int64_t k)
    : query_(query),
      gallery_(gallery),
      queries_(queries),
      n_(n),
      d_(d),
      k_(k),
      query_blocks_((queries + kQueryBlock - 1) / kQueryBlock),
      gallery_splits_(
          std::clamp<int64_t>(kTasks / std::max<int64_t>(1, query_blocks_), 1, std::max<int64_t>(1, n / kMinSplit))),
      found_(size_t(tasks())) {}

void TopKSearch::run(int64_t task) {
  const int64_t block = task / gallery_splits_, split = task % gallery_splits_;
  const int64_t q0 = block * kQueryBlock, q1 = std::min(queries_, q0 + kQueryBlock);
  const int64_t g0 = n_ * split / gallery_splits_, g1 = n_ * (split + 1) / gallery_splits_;
  const int64_t panel = std::clamp<int64_t>(65536 / std::max<int64_t>(1, d_), 16, 512);  // rows in L2: 256 KiB
  std::vector<float> scores(size_t(kQueryBlock * panel));
  auto& found = found_[size_t(task)];
  found.assign(size_t(q1 - q0), TopK(k_));
  for (int64_t g = g0; g < g1; g += panel) {
    const int64_t rows = std::min(panel, g1 - g);
    search_kernels().dot_tile(query_ + q0 * d_, q1 - q0, gallery_ + g * d_, rows, d_, scores.data(), panel);
    for (int64_t q = 0; q < q1 - q0; ++q) found[size_t(q)].offer(scores.data() + q * panel, rows, g);
  }
}

void TopKSearch::write(int64_t begin, int64_t end, float* scores, int64_t* ids) {
  for (int64_t q = begin; q < end; ++q) {
    const int64_t block = q / kQueryBlock, at = q % kQueryBlock;
    TopK& best = found_[size_t(block * gallery_splits_)][size_t(at)];
    for (int64_t split = 1; split < gallery_splits_; ++split)
      best.merge(found_[size_t(block * gallery_splits_ + split)][size_t(at)]);
    best.write(scores + q * k_, ids + q * k_);
  }
}

}  // namespace simplexfix::cpu
