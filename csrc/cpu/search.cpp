#include "search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "float_mode.h"
#include "parallel.h"
#include "select.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kMaxQueryBlock = 252;  // a multiple of 6, the queries that a kernel takes at once
// Queries of a block times k: bounds what waits, at worst 32 k + 2048 rows of 8 bytes for each query.
constexpr int64_t kMaxBlockResults = int64_t(1) << 18;
constexpr int64_t kTasksPerThread = 2;      // for an even load; each task reads the gallery and finds a cutoff anew
constexpr int64_t kMinSplit = 4096;         // gallery rows that are worth a task of their own
constexpr int64_t kStep = 16 * kPanelRows;  // rows between two looks at the other tasks' cutoffs
constexpr int64_t kSparseSteps = 16;        // of which one has its first panel in the sparse sample
// Where a mask leaves fewer than one row in these, each is scored whole.  Measured at d = 128: that takes as long as
// the codes at one row in 38.
constexpr int64_t kMaskedRows = 32;
static_assert(kPanelRows == 64, "a word of a mask is a panel");
constexpr float kInfinity = std::numeric_limits<float>::infinity();

void raise(std::atomic<float>& highest, float score) {
  float seen = highest.load(std::memory_order_relaxed);
  while (seen < score && !highest.compare_exchange_weak(seen, score, std::memory_order_relaxed)) {
  }
}

std::unique_ptr<std::atomic<float>[]> no_scores(int64_t n) {
  auto scores = std::make_unique<std::atomic<float>[]>(size_t(n));
  for (int64_t i = 0; i < n; ++i) scores[size_t(i)] = -kInfinity;
  return scores;
}
}  // namespace

struct Search::QueryState {
  float assumed;                            // a score that k rows are taken to reach, not yet for certain; or -inf
  float known;                              // the score of which cutoff was made
  float cutoff;                             // what the upper bound of a row must reach; -inf while nothing is known
  bool dense;                               // the rows at hand are scored whole
  int64_t dense_until;                      // rows seen before they no longer are
  int64_t dense_rows;                       // how many the next time: twice as many each time
  int64_t drained_at;                       // rows seen when the list was last scored whole
  size_t limit;                             // of the list before it is drained
  size_t next;                              // in the list that is being scored
  std::vector<Waiting> waiting, promising;  // by ascending row; waiting: those of the sample, then the others

  void reset() {
    assumed = known = cutoff = -kInfinity;
    waiting.clear();
    promising.clear();
  }

  void start(size_t first_limit) {
    dense_until = drained_at = 0;
    dense_rows = kStep;
    limit = first_limit;
  }
};

// Kept from task to task: fresh pages would cost more than some of the work.
struct Search::Scratch {
  std::vector<QueryState> state;
  std::vector<float> cutoff, panel_cutoff, upper;  // upper: of one panel
  std::vector<uint64_t> passed;
  std::vector<float> selection, scores, dense_queries;
  std::vector<const void*> pointers;
  std::vector<int64_t> dense;
  std::vector<Waiting> searched;
};

struct Search::Task : Scratch {
  const float* query;  // [queries, d]
  int64_t queries, g0, g1;
  TopK* best;                   // [queries]
  std::atomic<float>* highest;  // [queries]: the highest k-th best score of any task
  bool assumes;                 // that the k-th best of all reaches rank_in the sample
  std::optional<QueryCodes> codes = {};
  int64_t wanted = 0;    // best rows of the part at hand
  size_t max_limit = 0;  // of the lists
  int64_t seen = 0;      // rows, in the sample or outside
};

Search::Search(const float* query, int64_t queries, const GalleryRows& rows, const GalleryCodes* codes, int64_t k,
               int64_t threads, Interrupt* interrupt)
    : query_(query),
      queries_(queries),
      rows_(rows),
      dot_(search_kernels().dot[int(rows.type)]),
      codes_(codes_for(rows, codes, k)),
      interrupt_(interrupt),
      k_(k) {
  const int64_t wanted = threads > 1 ? kTasksPerThread * threads : 1;
  const int64_t most = std::clamp<int64_t>(kMaxBlockResults / k / 6 * 6, 6, kMaxQueryBlock);
  query_block_ = std::clamp<int64_t>(ceil_div(ceil_div(queries, wanted), 6) * 6, 6, most);
  query_blocks_ = ceil_div(queries, query_block_);
  splits_ = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(1, query_blocks_)), 1,
                                std::max<int64_t>(1, rows.n / kMinSplit));
  splits_ = std::max(splits_, ceil_div(rows.n, int64_t(1) << 31));  // Waiting::row is 32 bits
  found_.resize(size_t(tasks()));
  highest_ = no_scores(queries);
}

Search::~Search() = default;

bool Search::can_use_codes(int64_t n, int64_t d, int64_t k) {
  return d <= GalleryCodes::kMaxDim && k <= n / 4;  // where a quarter is wanted, nearly all would pass
}

const GalleryCodes* Search::codes_for(const GalleryRows& rows, const GalleryCodes* codes, int64_t k) {
  return can_use_codes(rows.searched, rows.d, k) && rows.searched * kMaskedRows >= rows.n ? codes : nullptr;
}

int64_t Search::threads_for(int64_t queries, const GalleryRows& rows, int64_t most) {
  constexpr double kProductsPerThread = 1 << 22;  // about 50 us, what a thread costs to start
  return cpu::threads_for(double(queries) * double(rows.searched) * double(rows.d), kProductsPerThread, most);
}

bool Search::any_searched(int64_t begin, int64_t end) const {
  if (!rows_.mask) return true;
  return std::any_of(rows_.mask + begin / 64, rows_.mask + ceil_div(end, 64), [](uint64_t word) { return word != 0; });
}

void Search::run(int64_t index) {
  const IeeeArithmetic ieee;
  const int64_t block = index / splits_, split = index % splits_;
  const int64_t q0 = block * query_block_, q1 = std::min(queries_, q0 + query_block_);
  const int64_t steps = ceil_div(rows_.n, kStep);
  const int64_t g0 = steps * split / splits_ * kStep, g1 = std::min(rows_.n, steps * (split + 1) / splits_ * kStep);
  auto& best = found_[size_t(index)];
  best.assign(size_t(q1 - q0), TopK(k_));
  Task task{take_scratch(), query_ + q0 * rows_.d, q1 - q0, g0, g1, best.data(), highest_.get() + q0, true};
  sweep(task);
  if (codes_) search_again(task);
  give_back(std::move(task));
}

// Queries whose k-th best score does not reach what was assumed may have lost rows: a task of their own assumes
// nothing.
void Search::search_again(Task& task) {
  std::vector<int64_t> again;
  for (int64_t q = 0; q < task.queries; ++q)
    if (task.state[size_t(q)].assumed > task.highest[size_t(q)]) again.push_back(q);
  if (again.empty()) return;
  const auto n = int64_t(again.size()), d = rows_.d;
  std::vector<float> query(size_t(n * d));
  for (int64_t i = 0; i < n; ++i)
    std::memcpy(query.data() + i * d, task.query + again[size_t(i)] * d, size_t(d) * sizeof(float));
  std::vector<TopK> best(again.size(), TopK(k_));
  const auto highest = no_scores(n);
  Task second{take_scratch(), query.data(), n, task.g0, task.g1, best.data(), highest.get(), false};
  sweep(second);
  for (int64_t i = 0; i < n; ++i) task.best[again[size_t(i)]] = std::move(best[size_t(i)]);
  give_back(std::move(second));
}

void Search::sweep(Task& task) {
  const auto n = size_t(task.queries);
  task.state.resize(n);
  for (QueryState& state : task.state) state.reset();
  if (!codes_) return sweep_part(task, Part::kAll);
  task.codes.emplace(task.query, task.queries, *codes_);
  task.cutoff.resize(n);
  task.panel_cutoff.resize(n);
  task.passed.resize(n);
  task.upper.resize(n * kPanelRows);
  for (Part part : {Part::kSparse, Part::kSample, Part::kRest}) {
    sweep_part(task, part);
    score_best(task);
  }
  score_in_windows(task, &QueryState::waiting);
  for (int64_t q = 0; q < task.queries; ++q) refresh(task, q);
}

void Search::sweep_part(Task& task, Part part) {
  const int64_t rows = task.g1 - task.g0, steps = ceil_div(rows, kStep);
  const bool samples = part == Part::kSparse || part == Part::kSample;
  const int64_t sampled = part == Part::kSparse ? ceil_div(steps, kSparseSteps) : steps;
  task.wanted = samples && task.assumes ? rank_in(double(sampled * kPanelRows) / double(rows)) : k_;
  const size_t limit = size_t(std::min(8 * task.wanted, rows_.n)) + 512;
  task.max_limit = 4 * limit;
  task.seen = 0;
  for (QueryState& state : task.state) state.start(limit);
  for (int64_t step = 0; step < steps; ++step) {
    if (samples && (step % kSparseSteps == 0) != (part == Part::kSparse)) continue;
    const int64_t first = task.g0 + step * kStep;
    const int64_t begin = std::min(part == Part::kRest ? first + kPanelRows : first, task.g1);
    const int64_t end = std::min(first + (samples ? kPanelRows : kStep), task.g1);
    check_interrupt();
    if (!any_searched(begin, end)) continue;
    for (int64_t q = 0; codes_ && q < task.queries; ++q) refresh(task, q);
    score_all(task, begin, end);
    if (codes_) scan(task, begin, end);
  }
}

// The rank in a sample, so large a share of all rows, that the k-th best of all reaches but for bad luck: of the k best
// it holds a binomial number, three standard deviations and three more than expected less than once in 10^3 times: more
// room would let more rows through for every query, which costs more than searching one of a thousand again.
int64_t Search::rank_in(double share) const {
  const double expected = double(k_) * std::min(1.0, share);
  return std::min(k_, int64_t(expected + 3 * std::sqrt(expected)) + 3);
}

Search::Scratch Search::take_scratch() {
  const std::lock_guard lock(scratch_mutex_);
  if (scratch_.empty()) return {};
  Scratch scratch = std::move(scratch_.back());
  scratch_.pop_back();
  return scratch;
}

void Search::give_back(Scratch&& scratch) {
  const std::lock_guard lock(scratch_mutex_);
  scratch_.push_back(std::move(scratch));
}

// The cutoff of a query from the best scores so far, its own and the other tasks'.
void Search::refresh(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  TopK& best = task.best[size_t(q)];
  raise(task.highest[size_t(q)], best.kth_score());
  const float any = std::max(state.assumed, task.highest[size_t(q)].load(std::memory_order_relaxed));
  if (any == state.known) return;
  state.known = any;
  state.cutoff = task.codes->cutoff(q, any);
}

// Scores rows [begin, end) for the queries whose bounds are of no use there.
void Search::score_all(Task& task, int64_t begin, int64_t end) {
  const int64_t d = rows_.d;
  std::vector<int64_t>& dense = task.dense;
  dense.clear();
  for (int64_t q = 0; q < task.queries; ++q) {
    QueryState& state = task.state[size_t(q)];
    state.dense = !codes_ || task.seen < state.dense_until;
    if (state.dense) dense.push_back(q);
    if (codes_) task.cutoff[size_t(q)] = state.dense ? kInfinity : state.cutoff;
  }
  if (dense.empty()) return;
  if (2 * rows_.searched < rows_.n) return score_searched(task, begin, end);
  const auto n = int64_t(dense.size());
  const float* query = task.query;
  if (n < task.queries) {
    task.dense_queries.resize(size_t(n * d));
    for (int64_t i = 0; i < n; ++i)
      std::memcpy(task.dense_queries.data() + i * d, query + dense[size_t(i)] * d, size_t(d) * sizeof(float));
    query = task.dense_queries.data();
  }
  const int64_t panel = std::clamp<int64_t>(65536 / std::max<int64_t>(1, d), 16, 512);  // rows in L2: 256 KiB
  task.scores.resize(std::max(task.scores.size(), size_t(n * panel)));
  for (int64_t g = begin; g < end;) {
    const int64_t rows = std::min({panel, end - g, rows_.run_length(g)});
    check_interrupt();
    dot_.tile(query, n, rows_.row(g), rows, d, task.scores.data(), panel);
    for (int64_t i = 0; i < n; ++i) {
      TopK& best = task.best[size_t(dense[size_t(i)])];
      const float* scores = task.scores.data() + i * panel;
      if (!rows_.ids && !rows_.mask) {
        best.offer(scores, rows, g);
      } else {
        for (int64_t r = 0; r < rows; ++r)
          if (rows_.is_searched(g + r)) best.offer({scores[r], rows_.id(g + r)});
      }
    }
    g += rows;
  }
}

// The same where a mask leaves most rows out: only the others are scored.
void Search::score_searched(Task& task, int64_t begin, int64_t end) {
  std::vector<Waiting>& rows = task.searched;
  rows.clear();
  for (int64_t g = begin; g < end; ++g)
    if (rows_.is_searched(g)) rows.push_back({0.f, uint32_t(g - task.g0)});
  for (const int64_t q : task.dense) {
    check_interrupt();
    score(task, q, rows.data(), rows.data() + rows.size());
  }
}

// The first pass over rows [begin, end) for the other queries.
void Search::scan(Task& task, int64_t begin, int64_t end) {
  const bool all_dense = int64_t(task.dense.size()) == task.queries;
  const CodeQueries queries = task.codes->view(task.panel_cutoff.data());
  for (int64_t g = begin; g < end; g += kPanelRows) {
    const int64_t rows = std::min(kPanelRows, end - g);
    const uint64_t present = ~uint64_t(0) >> (kPanelRows - rows) & rows_.mask_word(g / kPanelRows);
    task.seen += rows_.mask ? std::popcount(present) : rows;
    if (all_dense || present == 0) continue;
    const CodePanel panel = codes_->panel(g / kPanelRows);
    const float panel_norm = codes_->panel_norm(g / kPanelRows);
    task.codes->panel_cutoffs(task.cutoff.data(), panel_norm, task.panel_cutoff.data());
    search_kernels().scan_panel(panel, queries, codes_->groups(), task.passed.data(), task.upper.data());
    for (int64_t q = 0; q < task.queries; ++q) {
      uint64_t mask = task.passed[size_t(q)] & present;
      if (!mask) continue;
      QueryState& state = task.state[size_t(q)];
      const float more = task.codes->panel_term(q, panel_norm);
      for (; mask; mask &= mask - 1) {
        const int bit = __builtin_ctzll(mask);
        state.waiting.push_back({task.upper[size_t(q * kPanelRows + bit)] + more, uint32_t(g - task.g0 + bit)});
      }
      if (state.waiting.size() >= state.limit) drain(task, q);
    }
  }
}

// Scores the most promising k; all, if that leaves too many.
void Search::drain(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  prune(task, q);
  if (state.waiting.size() < state.limit / 2) return;
  take_best(task, q);
  score_and_clear(task, q, state.promising);
  prune(task, q);
  if (state.waiting.size() < state.limit / 2) {
    state.limit = std::min(2 * state.limit, task.max_limit);
    return;
  }
  // none passes for certain before k are scored, which the sample of take_best may miss
  const bool most_passed =
      state.cutoff > -kInfinity && int64_t(state.waiting.size()) > (task.seen - state.drained_at) / 4;
  if (!most_passed && state.limit < task.max_limit) {
    state.limit *= 2;
    return;
  }
  score_and_clear(task, q, state.waiting);
  state.drained_at = task.seen;
  if (most_passed) {
    state.drained_at = state.dense_until = task.seen + state.dense_rows;
    state.dense_rows *= 2;
    state.limit = task.max_limit / 4;
  }
  prune(task, q);
}

// Drops the waiting rows that can no longer be among the best.
void Search::prune(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  if (task.wanted < k_) state.assumed = std::max(state.assumed, task.best[size_t(q)].nth_score(task.wanted));
  refresh(task, q);
  task.cutoff[size_t(q)] = state.cutoff;
  std::vector<Waiting>& waiting = state.waiting;
  Waiting* const end = drop_if(waiting.data(), waiting.data() + waiting.size(),
                               [&](const Waiting& w) { return w.upper < state.cutoff; });
  waiting.resize(size_t(end - waiting.data()));
}

// Moves about as many waiting rows as are wanted, those of the highest upper bounds to the promising ones, in the order
// of the rows.
void Search::take_best(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  std::vector<Waiting>& waiting = state.waiting;
  const int64_t k = task.wanted;
  if (int64_t(waiting.size()) <= k) {
    state.promising.swap(waiting);
    return;
  }
  // The k-th by a sample: any rows will do, the better the more they raise the cutoff.
  const size_t stride = std::clamp<size_t>(size_t(k) / 64, 1, 4);
  std::vector<float>& upper = task.selection;
  upper.clear();
  for (size_t i = 0; i < waiting.size(); i += stride) upper.push_back(waiting[i].upper);
  const size_t margin = stride == 1 ? 0 : size_t(2 * std::sqrt(double(k) / double(stride)));
  const size_t rank = std::min(upper.size() - 1, size_t(k - 1) / stride + margin);
  select_nth(upper.data(), int64_t(rank), upper.data() + upper.size(), std::greater<>());
  const float kth = upper[rank];
  state.promising.resize(waiting.size());
  Waiting* taken = state.promising.data();
  Waiting* const most = taken + 2 * k;  // where many bounds are equal
  Waiting* const end = extract_if(waiting.data(), waiting.data() + waiting.size(), taken,
                                  [&](const Waiting& w) { return int(w.upper >= kth) & int(taken < most); });
  waiting.resize(size_t(end - waiting.data()));
  state.promising.resize(size_t(taken - state.promising.data()));
}

void Search::score(Task& task, int64_t q, const Waiting* first, const Waiting* last) {
  const size_t n = size_t(last - first);
  task.pointers.resize(n);
  task.scores.resize(std::max(task.scores.size(), n));
  for (size_t i = 0; i < n; ++i) task.pointers[i] = rows_.row(task.g0 + first[i].row);
  dot_.scattered(task.query + q * rows_.d, task.pointers.data(), int64_t(n), rows_.d, task.scores.data());
  TopK& best = task.best[size_t(q)];
  for (size_t i = 0; i < n; ++i) {
    const int64_t row = task.g0 + first[i].row;
    best.offer({task.scores[i], rows_.id(row)});
  }
}

void Search::score_and_clear(Task& task, int64_t q, std::vector<Waiting>& list) {
  score(task, q, list.data(), list.data() + list.size());
  list.clear();
}

// Scores the most promising of each query and drops what can then be left out.
void Search::score_best(Task& task) {
  for (int64_t q = 0; q < task.queries; ++q) {
    prune(task, q);
    std::vector<Waiting>& waiting = task.state[size_t(q)].waiting;
    const auto by_row = [](const Waiting& a, const Waiting& b) { return a.row < b.row; };
    const auto others = std::is_sorted_until(waiting.begin(), waiting.end(), by_row);
    std::inplace_merge(waiting.begin(), others, waiting.end(), by_row);
    take_best(task, q);
  }
  score_in_windows(task, &QueryState::promising);
  for (int64_t q = 0; q < task.queries; ++q) prune(task, q);
}

// Scores a list of each query, window by window of the gallery: a row that several queries want is read
// from memory once, and all in one direction.
void Search::score_in_windows(Task& task, std::vector<Waiting> QueryState::* list) {
  size_t pairs = 0;
  for (QueryState& state : task.state) {
    pairs += (state.*list).size();
    state.next = 0;
  }
  if (pairs == 0) return;
  // sixteen rows to a query and window, so that the kernel has some to do at once
  const int64_t window = std::max<int64_t>(16, 16 * task.queries * (task.g1 - task.g0) / int64_t(pairs));
  for (int64_t g = 0; g < task.g1 - task.g0; g += window) {
    check_interrupt();
    for (int64_t q = 0; q < task.queries; ++q) {
      QueryState& state = task.state[size_t(q)];
      const std::vector<Waiting>& rows = state.*list;
      const size_t first = state.next;
      while (state.next < rows.size() && int64_t(rows[state.next].row) < g + window) ++state.next;
      if (first < state.next) score(task, q, rows.data() + first, rows.data() + state.next);
    }
  }
  for (QueryState& state : task.state) (state.*list).clear();
}

void Search::write(int64_t begin, int64_t end, float* scores, int64_t* ids) {
  for (int64_t q = begin; q < end; ++q) {
    const int64_t block = q / query_block_, at = q % query_block_;
    TopK& best = found_[size_t(block * splits_)][size_t(at)];
    for (int64_t split = 1; split < splits_; ++split) best.merge(found_[size_t(block * splits_ + split)][size_t(at)]);
    best.write(scores + q * k_, ids + q * k_);
  }
}

}  // namespace simplexfix::cpu
