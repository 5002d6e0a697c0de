// Exact top-k by cosine, free of torch. Every score is the fp64 dot product of dot.inc, rounded to fp32. core/ranking.h
// defines the order. Codes of the gallery (gallery_codes.h), if given, yield an upper bound of each row's score. Then
// only those rows are scored whose bound reaches the cutoff, which follows from the k-th best score so far.
//
// Mapping: a task is a block of queries against a split, a contiguous range of gallery rows. It reads the split in
// panels of 64 rows. Rows whose bounds reach the cutoff become candidates of the query (candidates.h). When a list of
// candidates is full, its best k are scored, which raises the cutoff and drops most of the others. The remaining
// candidates are scored at the end. If too many rows pass (kMostPass), the next rows are all scored, as without codes.
//
// Sample: the first panel of each 16 is read before the others, and of these panels one in 16 before the rest. The
// sample yields a speculative cutoff, a score that k rows reach with p > 0.999, so that few rows pass from there on. If
// fewer than k rows reach it after all, the query is searched again without this cutoff. That happens if the order of
// the rows correlates with the sample.
//
// Bytes: a task reads the codes of its split once (1 byte per number), and the row of each candidate that is scored.
// With a mask only some rows are searched, as if the gallery had no others.
//
// Determinism: the tasks of a query share the cutoffs, so the work depends on timing. The results do not: a row is left
// out only if k others certainly rank before it.
#pragma once
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "candidates.h"
#include "gallery_codes.h"
#include "gallery_rows.h"
#include "interrupt.h"
#include "query_codes.h"
#include "topk.h"

namespace simplexfix::cpu {

class Search {
 public:
  // query [queries, d] must be normalised. codes are those of the same gallery, or nullptr. All must outlive the
  // search. threads determines the number of tasks and never the results. interrupt belongs to the thread that waits
  // for the tasks, or is nullptr.
  Search(const float* query, int64_t queries, const GalleryRows& rows, const GalleryCodes* codes, int64_t k,
         int64_t threads, Interrupt* interrupt = nullptr);
  ~Search();

  // Returns whether the bounds can leave out any of n rows.
  static bool can_use_codes(int64_t n, int64_t d, int64_t k);

  // Returns the number of threads that are worth starting for the search, at most `most`.
  static int64_t threads_for(int64_t queries, const GalleryRows& rows, int64_t most);

  // Tasks may run in any order on any threads.
  int64_t tasks() const { return query_blocks_ * splits_; }
  void run(int64_t task);
  // Call it after all tasks: writes the results of queries [begin, end) to their rows of scores and ids [queries, k].
  void write(int64_t begin, int64_t end, float* scores, int64_t* ids);

 private:
  // The rows that a sweep reads. A step is 16 panels. kSparse: the first panel of every 16th step; kSample: the first
  // panel of the other steps; kOthers: all remaining rows; kAll: every row.
  enum class Pass { kSparse, kSample, kOthers, kAll };
  struct QueryState;
  struct Scratch;
  struct Task;

  // Returns codes, or nullptr where scoring all searched rows is faster.
  static const GalleryCodes* codes_for(const GalleryRows& rows, const GalleryCodes* codes, int64_t k);
  // Returns whether the mask admits any of rows [begin, end); begin is a multiple of 64.
  bool any_searched(int64_t begin, int64_t end) const;
  void check_interrupt() const {
    if (interrupt_) interrupt_->check();
  }
  Scratch take_scratch();
  void give_back(Scratch&& scratch);
  int64_t rank_in(double fraction) const;
  // The steps of run(). begin and end are rows of the gallery, and q is the index of a query in the task.
  void sweep(Task& task);  // finds the best k rows of the split for each query
  void search_again(Task& task);
  void sweep_pass(Task& task, Pass pass);  // reads the rows of one pass; candidates may remain in the lists
  void refresh(Task& task, int64_t q);
  void score_all(Task& task, int64_t begin, int64_t end);
  void score_searched(Task& task, int64_t begin, int64_t end);
  void scan(Task& task, int64_t begin, int64_t end);
  void rescore(Task& task, int64_t q);
  void prune(Task& task, int64_t q);
  // Offers the exact scores of rows [first, last) to the best k of query q.
  void score(Task& task, int64_t q, const BoundedRow* first, const BoundedRow* last);
  void score_and_clear(Task& task, int64_t q, std::vector<BoundedRow>& list);
  void score_best(Task& task);
  void score_in_windows(Task& task, std::vector<BoundedRow> CandidateList::* list);

  const float* query_;
  int64_t queries_;
  GalleryRows rows_;
  const DotKernels& dot_;
  const GalleryCodes* codes_;
  Interrupt* const interrupt_;
  int64_t k_, query_block_, query_blocks_, splits_;
  std::unique_ptr<std::atomic<float>[]> highest_;  // per query: the highest k-th best score of any task
  std::mutex scratch_mutex_;
  std::vector<Scratch> scratch_;
  std::vector<std::vector<TopK>> found_;  // [task][query of the block]
};

}  // namespace simplexfix::cpu
