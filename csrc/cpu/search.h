// Exact top-k by cosine, free of torch: every score is the fp64 dot product of dot.inc, rounded to
// fp32; the order is core/ranking.h's.  With a gallery in codes (gallery_codes.h) only those rows are
// scored whose upper bound says that they may be among the best.
//
// Mapping: a task is a block of queries against a stretch of the gallery.  It walks the stretch in
// panels of 64 rows; what passes the bounds waits in a list per query.  When a list is full, its most
// promising k rows are scored, which raises the cutoff and empties most of the list; the rest is
// scored at the end.  Where the bounds let most rows of a stretch through, the next ones are scored
// whole, as without codes.
// The first panel of each 16 comes before the others (and of those one in 16 first of all): a sample.
// A score so high in it that k rows of all are as good as sure to reach it is assumed as the k-th best,
// so that few rows pass from there on.  Where fewer than k reach it after all (rows in an order that
// the sample fits into), the query is searched again without.
// Bytes: per task the codes of its stretch once (1 byte per number), a row's own for each row scored.
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
  struct Waiting {
    float upper;
    uint32_t row;  // from the task's first
  };
  // Of a task's rows: a panel in 256, the first of each other step, what is left; or all.
  enum class Part { kSparse, kSample, kRest, kAll };
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
  int64_t rank_in(double share) const;
  void search_again(Task& task);
  void sweep(Task& task);
  void sweep_part(Task& task, Part part);
  void refresh(Task& task, int64_t q);
  void score_all(Task& task, int64_t begin, int64_t end);
  void score_searched(Task& task, int64_t begin, int64_t end);
  void scan(Task& task, int64_t begin, int64_t end);
  void drain(Task& task, int64_t q);
  void prune(Task& task, int64_t q);
  void take_best(Task& task, int64_t q);
  void score(Task& task, int64_t q, const Waiting* first, const Waiting* last);
  void score_and_clear(Task& task, int64_t q, std::vector<Waiting>& list);
  void score_best(Task& task);
  void score_in_windows(Task& task, std::vector<Waiting> QueryState::* list);

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
