#include "search.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

#include "float_mode.h"
#include "select.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kMaxQueryBlock = 252;  // a multiple of 6, the queries that a kernel takes at once
// Queries of a block times k: bounds what waits, at worst 32 k rows of 8 bytes for each query.
constexpr int64_t kMaxBlockResults = int64_t(1) << 18;
constexpr int64_t kTasksPerThread = 2;      // for an even load; each task reads the gallery and finds a cutoff anew
constexpr int64_t kMinSplit = 4096;         // gallery rows that are worth a task of their own
constexpr int64_t kStep = 16 * kPanelRows;  // rows between two looks at the other tasks' cutoffs
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

void raise(std::atomic<float>& highest, float score) {
  float seen = highest.load(std::memory_order_relaxed);
  while (seen < score && !highest.compare_exchange_weak(seen, score, std::memory_order_relaxed)) {
  }
}
}  // namespace

struct Search::QueryState {
  float cutoff;                             // what the upper bound of a row must reach; -inf while nothing is known
  bool dense;                               // this step's rows are scored whole
  int64_t dense_until;                      // rows before this are scored whole
  int64_t dense_steps;                      // how many steps the next time: twice as many each time
  int64_t drained_at;                       // the row at which the list was last scored whole
  size_t limit;                             // of the list before it is drained
  size_t next;                              // in the list that is being scored
  std::vector<Waiting> waiting, promising;  // by ascending row

  void reset(int64_t first_row, size_t first_limit) {
    cutoff = -kInfinity;
    dense_until = drained_at = first_row;
    dense_steps = 1;
    limit = first_limit;
    waiting.clear();
    promising.clear();
  }
};

// Kept from task to task: fresh pages would cost more than some of the work.
struct Search::Scratch {
  std::vector<QueryState> state;
  std::vector<float> cutoff, upper;  // of one panel
  std::vector<uint64_t> passed;
  std::vector<float> selection, scores, dense_queries;
  std::vector<const void*> pointers;
  std::vector<int64_t> dense;
};

struct Search::Task : Scratch {
  int64_t q0, queries, g0, g1;
  TopK* best;  // [queries]
};

Search::Search(const float* query, int64_t queries, const GalleryRows& rows, const GalleryCodes* codes, int64_t k,
               int64_t threads)
    : query_(query),
      queries_(queries),
      rows_(rows),
      dot_(search_kernels().dot[int(rows.type)]),
      codes_(can_use_codes(rows.n, rows.d, k) ? codes : nullptr),
      k_(k) {
  const int64_t wanted = threads > 1 ? kTasksPerThread * threads : 1;
  const int64_t most = std::clamp<int64_t>(kMaxBlockResults / k / 6 * 6, 6, kMaxQueryBlock);
  query_block_ = std::clamp<int64_t>(ceil_div(ceil_div(queries, wanted), 6) * 6, 6, most);
  query_blocks_ = ceil_div(queries, query_block_);
  splits_ = std::clamp<int64_t>(ceil_div(wanted, std::max<int64_t>(1, query_blocks_)), 1,
                                std::max<int64_t>(1, rows.n / kMinSplit));
  splits_ = std::max(splits_, ceil_div(rows.n, int64_t(1) << 31));  // Waiting::row is 32 bits
  first_limit_ = size_t(std::min(4 * k, rows.n)) + 128;
  found_.resize(size_t(tasks()));
  best_kth_ = std::make_unique<std::atomic<float>[]>(size_t(queries));
  for (int64_t q = 0; q < queries; ++q) best_kth_[size_t(q)] = -kInfinity;
  if (codes_) query_codes_.emplace(query, queries, *codes_);
}

Search::~Search() = default;

bool Search::can_use_codes(int64_t n, int64_t d, int64_t k) {
  return d <= GalleryCodes::kMaxDim && k <= n / 4;  // where a quarter is wanted, nearly all would pass
}

void Search::run(int64_t index) {
  const IeeeArithmetic ieee;
  const int64_t block = index / splits_, split = index % splits_;
  const int64_t q0 = block * query_block_, q1 = std::min(queries_, q0 + query_block_);
  const int64_t steps = ceil_div(rows_.n, kStep);
  const int64_t g0 = steps * split / splits_ * kStep, g1 = std::min(rows_.n, steps * (split + 1) / splits_ * kStep);
  auto& best = found_[size_t(index)];
  best.assign(size_t(q1 - q0), TopK(k_));
  Task task{take_scratch(), q0, q1 - q0, g0, g1, best.data()};
  const auto n = size_t(q1 - q0);
  task.state.resize(n);
  for (QueryState& state : task.state) state.reset(g0, first_limit_);
  task.cutoff.resize(n);
  task.passed.resize(n);
  task.upper.resize(n * kPanelRows);
  for (int64_t g = g0; g < g1; g += kStep) {
    const int64_t end = std::min(g + kStep, g1);
    for (int64_t q = 0; codes_ && q < task.queries; ++q) refresh(task, q);
    score_all(task, g, end);
    if (codes_) scan(task, g, end);
  }
  if (codes_) finish(task);
  give_back(std::move(task));
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
  const float own = task.best[size_t(q)].kth_score();
  std::atomic<float>& best = best_kth_[size_t(task.q0 + q)];
  raise(best, own);
  const float any = best.load(std::memory_order_relaxed);
  if (any == -kInfinity) return;
  task.state[size_t(q)].cutoff = query_codes_->cutoff(task.q0 + q, any);
}

// Scores rows [begin, end), one step, for the queries whose bounds are of no use there.
void Search::score_all(Task& task, int64_t begin, int64_t end) {
  const int64_t d = rows_.d;
  std::vector<int64_t>& dense = task.dense;
  dense.clear();
  for (int64_t q = 0; q < task.queries; ++q) {
    QueryState& state = task.state[size_t(q)];
    state.dense = !codes_ || begin < state.dense_until;
    if (state.dense) dense.push_back(q);
  }
  if (dense.empty()) return;
  const auto n = int64_t(dense.size());
  const float* query = query_ + task.q0 * d;
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
    dot_.tile(query, n, rows_.row(g), rows, d, task.scores.data(), panel);
    for (int64_t i = 0; i < n; ++i) {
      TopK& best = task.best[size_t(dense[size_t(i)])];
      const float* scores = task.scores.data() + i * panel;
      if (!rows_.ids) {
        best.offer(scores, rows, g);
      } else {
        for (int64_t r = 0; r < rows; ++r) best.offer({scores[r], rows_.id(g + r)});
      }
    }
    g += rows;
  }
}

// The first pass over rows [begin, end) for the other queries.
void Search::scan(Task& task, int64_t begin, int64_t end) {
  if (int64_t(task.dense.size()) == task.queries) return;
  const CodeQueries queries = query_codes_->view(task.q0, task.queries, task.cutoff.data());
  for (int64_t g = begin; g < end; g += kPanelRows) {
    const CodePanel panel = codes_->panel(g / kPanelRows);
    const float panel_norm = codes_->panel_norm(g / kPanelRows);
    for (int64_t q = 0; q < task.queries; ++q) {
      const QueryState& state = task.state[size_t(q)];
      task.cutoff[size_t(q)] =
          state.dense ? kInfinity : state.cutoff - query_codes_->panel_term(task.q0 + q, panel_norm);
    }
    search_kernels().scan_panel(panel, queries, codes_->groups(), task.passed.data(), task.upper.data());
    const uint64_t present = end - g >= kPanelRows ? ~uint64_t(0) : (uint64_t(1) << (end - g)) - 1;
    for (int64_t q = 0; q < task.queries; ++q) {
      uint64_t mask = task.passed[size_t(q)] & present;
      if (!mask) continue;
      QueryState& state = task.state[size_t(q)];
      const float more = query_codes_->panel_term(task.q0 + q, panel_norm);
      for (; mask; mask &= mask - 1) {
        const int bit = __builtin_ctzll(mask);
        state.waiting.push_back({task.upper[size_t(q * kPanelRows + bit)] + more, uint32_t(g - task.g0 + bit)});
      }
      if (state.waiting.size() >= state.limit) drain(task, q, end);
    }
  }
}

// Scores the most promising k; all, if that leaves too many.
void Search::drain(Task& task, int64_t q, int64_t row) {
  QueryState& state = task.state[size_t(q)];
  prune(task, q);
  if (state.waiting.size() < state.limit / 2) return;
  take_best(task, q);
  score_and_clear(task, q, state.promising);
  prune(task, q);
  if (state.waiting.size() < state.limit / 2) {
    state.limit = std::min(2 * state.limit, 8 * first_limit_);
    return;
  }
  // none passes for certain before k are scored, which the sample of take_best may miss
  const bool most_passed = state.cutoff > -kInfinity && int64_t(state.waiting.size()) > (row - state.drained_at) / 4;
  if (!most_passed && state.limit < 8 * first_limit_) {
    state.limit *= 2;
    return;
  }
  score_and_clear(task, q, state.waiting);
  state.drained_at = row;
  if (most_passed) {
    state.drained_at = state.dense_until = row + state.dense_steps * kStep;
    state.dense_steps *= 2;
    state.limit = first_limit_;
  }
  refresh(task, q);
}

// Drops the waiting rows that can no longer be among the best.
void Search::prune(Task& task, int64_t q) {
  refresh(task, q);
  QueryState& state = task.state[size_t(q)];
  std::vector<Waiting>& waiting = state.waiting;
  Waiting* const end = drop_if(waiting.data(), waiting.data() + waiting.size(),
                               [&](const Waiting& w) { return w.upper < state.cutoff; });
  waiting.resize(size_t(end - waiting.data()));
}

// Moves about k waiting rows of the highest upper bounds to the promising ones, in the order of the rows.
void Search::take_best(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  std::vector<Waiting>& waiting = state.waiting;
  if (int64_t(waiting.size()) <= k_) {
    state.promising.swap(waiting);
    return;
  }
  // The k-th by a sample: any rows will do, the better the more they raise the cutoff.
  const size_t stride = std::clamp<size_t>(size_t(k_) / 64, 1, 4);
  std::vector<float>& upper = task.selection;
  upper.clear();
  for (size_t i = 0; i < waiting.size(); i += stride) upper.push_back(waiting[i].upper);
  const size_t margin = stride == 1 ? 0 : size_t(2 * std::sqrt(double(k_) / double(stride)));
  const size_t rank = std::min(upper.size() - 1, size_t(k_ - 1) / stride + margin);
  select_nth(upper.data(), int64_t(rank), upper.data() + upper.size(), std::greater<>());
  const float kth = upper[rank];
  state.promising.resize(waiting.size());
  Waiting* taken = state.promising.data();
  Waiting* const most = taken + 2 * k_;  // where many bounds are equal
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
  dot_.scattered(query_ + (task.q0 + q) * rows_.d, task.pointers.data(), int64_t(n), rows_.d, task.scores.data());
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

// Scores what is left: the most promising of each query first.
void Search::finish(Task& task) {
  for (int64_t q = 0; q < task.queries; ++q) {
    prune(task, q);
    take_best(task, q);
  }
  score_in_windows(task, &QueryState::promising);
  for (int64_t q = 0; q < task.queries; ++q) prune(task, q);
  score_in_windows(task, &QueryState::waiting);
  for (int64_t q = 0; q < task.queries; ++q) refresh(task, q);
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
