// Collects the exact top-k of scored rows, free of torch. dot.inc computes the scores; core/ranking.h defines the
// order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/ranking.h"

namespace simplexfix::cpu {

// Returns the first row with a number that is not finite, or -1.
int64_t first_non_finite_row(const float* rows, int64_t stride, int64_t d, int64_t begin, int64_t end);

// Collects the best k of the candidates that are offered in any order; collectors can be merged.
class TopK {
 public:
  explicit TopK(int64_t k);
  // Offers n scores of the ids first_id, first_id + 1, ...
  void offer(const float* scores, int64_t n, int64_t first_id);
  void merge(const TopK& other);
  void offer(const Candidate& candidate) { add(candidate); }
  // Returns the k-th best score so far, -inf if there are fewer candidates.
  float kth_score();
  // Returns the score at this rank, from 1 to k; -inf if there are fewer candidates.
  float nth_score(int64_t rank);
  // Writes k results, best first; missing ones get id -1 and score -inf.
  void write(float* scores, int64_t* ids);

 private:
  void add(const Candidate& candidate);
  void prune();

  int64_t k_;
  size_t capacity_;
  Candidate worst_;  // candidates that rank behind it cannot be among the best k
  std::vector<Candidate> candidates_;
};

}  // namespace simplexfix::cpu
