// Exact top-k by cosine, free of torch: every score is the fp64 dot product of dot.inc, rounded to
// fp32; the order is core/ranking.h's.  With a gallery in codes (gallery_codes.h) only those rows are
// scored whose upper bound says that they may be among the best.
//
// Mapping: a task is a block of queries against a split of the gallery.  It reads the split in panels of 64 rows; rows
// whose bounds reach the cutoff become candidates of the query (candidates.h).  A full list is rescored: its best k are
// scored, which raises the cutoff and drops most of the others; the last ones are scored at the end.  Where most rows
// pass, the next ones are scored whole, as without codes.
// The first panel of each 16 comes before the others (and of those one in 16 first of all): a sample.  From it follows
// a speculative cutoff, a score that k rows reach with p > 0.999, so that few rows pass from there on.  A query for
// which fewer than k reach it after all (rows in an order that correlates with the sample) is searched again without.
// Bytes: per task the codes of its split once (1 byte per number), and the row of each candidate that is scored.
// With a mask only some rows are searched, as if the gallery had no others.
// Determinism: the cutoffs are shared between the tasks of a query, so the work depends on timing;
// the results never do, because in the end a row is left out only if k others certainly rank before it.
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
  // Normalised queries [queries, d]; codes of the same gallery, or nullptr.  All must outlive the search.
  // threads says how many tasks are worth having; the results are the same with any.  interrupt: of the thread that
  // waits for the tasks, or nullptr.
  Search(const float* query, int64_t queries, const GalleryRows& rows, const GalleryCodes* codes, int64_t k,
         int64_t threads, Interrupt* interrupt = nullptr);
  ~Search();

  // Whether the bounds can leave anything out of n rows.
  static bool can_use_codes(int64_t n, int64_t d, int64_t k);

  // As many threads as the search is worth.
  static int64_t threads_for(int64_t queries, const GalleryRows& rows, int64_t most);

  // Tasks may run in any order on any threads.
  int64_t tasks() const { return query_blocks_ * splits_; }
  void run(int64_t task);
  // After all tasks: writes the results of queries [begin, end) to their places in scores and ids [queries, k].
  void write(int64_t begin, int64_t end, float* scores, int64_t* ids);

 private:
  // Of a task's rows: a panel in 256, the first of each other step, what is left; or all.
  enum class Pass { kSparse, kSample, kOthers, kAll };
  struct QueryState;
  struct Scratch;
  struct Task;

  static const GalleryCodes* codes_for(const GalleryRows& rows, const GalleryCodes* codes, int64_t k);
  bool any_searched(int64_t begin, int64_t end) const;
  void check_interrupt() const {
    if (interrupt_) interrupt_->check();
  }
  Scratch take_scratch();
  void give_back(Scratch&& scratch);
  int64_t rank_in(double fraction) const;
  void search_again(Task& task);
  void sweep(Task& task);
  void sweep_pass(Task& task, Pass pass);
  void refresh(Task& task, int64_t q);
  void score_all(Task& task, int64_t begin, int64_t end);
  void score_searched(Task& task, int64_t begin, int64_t end);
  void scan(Task& task, int64_t begin, int64_t end);
  void rescore(Task& task, int64_t q);
  void prune(Task& task, int64_t q);
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
  std::unique_ptr<std::atomic<float>[]> highest_;  // of each query: the highest k-th best score of any task
  std::mutex scratch_mutex_;
  std::vector<Scratch> scratch_;
  std::vector<std::vector<TopK>> found_;  // [task][query of the block]
};

}  // namespace simplexfix::cpu
