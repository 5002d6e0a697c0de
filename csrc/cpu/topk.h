// Exact top-k by cosine, free of torch.  Scores: dot.inc; order: core/ranking.h.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../core/ranking.h"

namespace simplexfix::cpu {

// The first row with a number that is not finite, or -1.
int64_t first_non_finite_row(const float* rows, int64_t stride, int64_t d, int64_t begin, int64_t end);

// The best k of the candidates offered, in any order and from any number of collectors.
class TopK {
 public:
  explicit TopK(int64_t k);
  // Offers n scores of the ids first_id, first_id + 1, ...
  void offer(const float* scores, int64_t n, int64_t first_id);
  void merge(const TopK& other);
  void offer(const Candidate& candidate) { add(candidate); }
  // The score of the k-th best so far, -inf where there are fewer.
  float kth_score();
  // The same for a rank of at most k.
  float nth_score(int64_t rank);
  // Writes k results, best first; where there are fewer, id -1 with score -inf.
  void write(float* scores, int64_t* ids);

 private:
  void add(const Candidate& candidate);
  void prune();

  int64_t k_;
  size_t capacity_;
  Candidate worst_;  // nothing that ranks behind it can be among the best k
  std::vector<Candidate> candidates_;
};

}  // namespace simplexfix::cpu
