#include "topk.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "select.h"

namespace simplexfix::cpu {
namespace {
constexpr size_t kReserved = 4096;  // reserved at once; k may be millions and the gallery small

constexpr auto ranks_before_branchless = [](const Candidate& a, const Candidate& b) {
  return bool(int(a.score > b.score) | (int(a.score == b.score) & int(a.id < b.id)));
};
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
  if (candidates_.capacity() == 0) candidates_.reserve(std::min(capacity_, kReserved));
  candidates_.push_back(candidate);
  if (candidates_.size() >= capacity_) prune();
}

void TopK::prune() {
  Candidate* const first = candidates_.data();
  select_nth(first, k_ - 1, first + candidates_.size(), ranks_before_branchless);
  candidates_.resize(size_t(k_));
  worst_ = candidates_.back();
}

float TopK::kth_score() {
  const auto found = int64_t(candidates_.size());
  if (found > k_ || (found == k_ && worst_.id == std::numeric_limits<int64_t>::max())) prune();
  return worst_.score;
}

float TopK::nth_score(int64_t rank) {
  const auto found = int64_t(candidates_.size());
  if (found < rank) return -std::numeric_limits<float>::infinity();
  Candidate* const first = candidates_.data();
  select_nth(first, rank - 1, first + found, ranks_before_branchless);
  return first[rank - 1].score;
}

void TopK::write(float* scores, int64_t* ids) {
  const int64_t found = std::min<int64_t>(k_, int64_t(candidates_.size()));
  if (int64_t(candidates_.size()) > k_) prune();
  std::sort(candidates_.begin(), candidates_.end(), [](const auto& a, const auto& b) { return ranks_before(a, b); });
  for (int64_t i = 0; i < k_; ++i) {
    scores[i] = i < found ? candidates_[size_t(i)].score : -std::numeric_limits<float>::infinity();
    ids[i] = i < found ? candidates_[size_t(i)].id : -1;
  }
}

}  // namespace simplexfix::cpu
