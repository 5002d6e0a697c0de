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

// Splits a search into tasks that may run in any order on any thread: blocks of queries, and for few
// queries blocks of the gallery too.
class TopKSearch {
 public:
  // Normalised rows; query [queries, d], gallery [n, d].
  TopKSearch(const float* query, int64_t queries, const float* gallery, int64_t n, int64_t d, int64_t k);
  int64_t tasks() const { return query_blocks_ * gallery_splits_; }
  void run(int64_t task);
  // After all tasks: the results of queries [begin, end).
  void write(int64_t begin, int64_t end, float* scores, int64_t* ids);

 private:
  const float *query_, *gallery_;
  int64_t queries_, n_, d_, k_, query_blocks_, gallery_splits_;
  std::vector<std::vector<TopK>> found_;  // [task][query of the block]
};

}  // namespace simplexfix::cpu
