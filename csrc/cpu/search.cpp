#include "search.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "candidates.h"
#include "float_mode.h"
#include "parallel.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kMaxQueryBlock = 252;  // a multiple of 6, the number of queries per kernel step
// Maximum of a block's queries times k. It bounds the candidates: at worst 32 k + 2048 of 8 bytes per query (see
// kListGrowth).
constexpr int64_t kMaxBlockResults = int64_t(1) << 18;
constexpr int64_t kTasksPerThread = 2;      // balances the load; each further task must sample its own split
constexpr int64_t kMinSplit = 4096;         // fewest gallery rows that are worth a task
constexpr int64_t kStep = 16 * kPanelRows;  // rows between two reads of the other tasks' cutoffs
constexpr int64_t kSparseSteps = 16;        // every 16th step has its first panel in the sparse sample
// If a mask admits fewer than 1 / kMaskedRows of the rows, these are scored without codes. Measured at d = 128: with
// and without codes, a search takes equally long at 1 / 38.
constexpr int64_t kMaskedRows = 32;
static_assert(kPanelRows == 64, "a word of a mask is a panel");
// A candidate list is rescored at its limit. At first this is kListPerWanted candidates per wanted row, plus
// kListSlack, so that a selection costs little compared with the rows that it drops. Each rescoring doubles the limit,
// up to kListGrowth times that, unless too many rows pass (kMostPass).
constexpr int64_t kListPerWanted = 8, kListSlack = 512;
constexpr size_t kListGrowth = 4;
// If more than 1 / kMostPass of the rows stay candidates, bounds cost more than they save: score the next rows without
// codes.
constexpr int64_t kMostPass = 4;
// Standard deviations, and rows, by which rank_in() exceeds the expected rank of the k-th best in a sample.
constexpr int64_t kSigmas = 3, kRankSlack = 3;
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
  float speculative_cutoff;  // k rows reach this score with p > 0.999, not yet for certain; or -inf
  float cutoff_score;        // the score from which cutoff was computed
  float cutoff;              // a candidate's upper bound must reach it; -inf before k rows are scored
  bool dense;                // the next rows are scored without codes
  int64_t dense_until;       // value of `seen` at which `dense` ends
  int64_t dense_rows;        // rows to score without codes the next time; it doubles each time
  int64_t rescored_at;       // value of `seen` when all candidates were last scored
  size_t limit;              // number of candidates at which they are rescored
  size_t next;               // position in the list that is being scored
  CandidateList candidates;

  void reset() {
    speculative_cutoff = cutoff_score = cutoff = -kInfinity;
    candidates.clear();
  }

  void start(size_t first_limit) {
    dense_until = rescored_at = 0;
    dense_rows = kStep;
    limit = first_limit;
  }
};

// Reused from task to task: page faults of fresh memory would cost more than some of the work.
struct Search::Scratch {
  std::vector<QueryState> state;
  std::vector<float> cutoff, panel_cutoff, upper;  // upper: of one panel
  std::vector<uint64_t> passed;
  std::vector<float> selection, scores, dense_queries;
  std::vector<const void*> pointers;
  std::vector<int64_t> dense;
  std::vector<BoundedRow> searched;
};

struct Search::Task : Scratch {
  const float* query;           // [queries, d]
  int64_t queries, g0, g1;      // the split is rows [g0, g1)
  TopK* best;                   // [queries]
  std::atomic<float>* highest;  // [queries]: the highest k-th best score of any task
  bool assumes;                 // whether sample passes set a speculative cutoff, at rank_in()
  std::optional<QueryCodes> codes = {};
  int64_t wanted = 0;    // number of best rows that the current pass collects
  size_t max_limit = 0;  // maximum limit of the lists
  int64_t seen = 0;      // rows that the current pass has read
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
  splits_ = std::max(splits_, ceil_div(rows.n, int64_t(1) << 31));  // BoundedRow::row is 32 bits
  found_.resize(size_t(tasks()));
  highest_ = no_scores(queries);
}

Search::~Search() = default;

bool Search::can_use_codes(int64_t n, int64_t d, int64_t k) {
  return d <= GalleryCodes::kMaxDim && k <= n / 4;  // if a quarter is wanted, nearly all rows pass
}

const GalleryCodes* Search::codes_for(const GalleryRows& rows, const GalleryCodes* codes, int64_t k) {
  return can_use_codes(rows.searched, rows.d, k) && rows.searched * kMaskedRows >= rows.n ? codes : nullptr;
}

int64_t Search::threads_for(int64_t queries, const GalleryRows& rows, int64_t most) {
  constexpr double kProductsPerThread = 1 << 21;  // about 50 us: a thread that is woken begins after 25
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

// A query whose k-th best score is below its speculative cutoff may have lost rows. This searches such queries again
// without a speculative cutoff.
void Search::search_again(Task& task) {
  std::vector<int64_t> again;
  for (int64_t q = 0; q < task.queries; ++q)
    if (task.state[size_t(q)].speculative_cutoff > task.highest[size_t(q)]) again.push_back(q);
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
  if (!codes_) return sweep_pass(task, Pass::kAll);
  task.codes.emplace(task.query, task.queries, *codes_);
  task.cutoff.resize(n);
  task.panel_cutoff.resize(n);
  task.passed.resize(n);
  task.upper.resize(n * kPanelRows);
  for (Pass pass : {Pass::kSparse, Pass::kSample, Pass::kOthers}) {
    sweep_pass(task, pass);
    score_best(task);
  }
  score_in_windows(task, &CandidateList::pending);
  for (int64_t q = 0; q < task.queries; ++q) refresh(task, q);
}

void Search::sweep_pass(Task& task, Pass pass) {
  const int64_t rows = task.g1 - task.g0, steps = ceil_div(rows, kStep);
  const bool samples = pass == Pass::kSparse || pass == Pass::kSample;
  const int64_t sampled = pass == Pass::kSparse ? ceil_div(steps, kSparseSteps) : steps;
  task.wanted = samples && task.assumes ? rank_in(double(sampled * kPanelRows) / double(rows)) : k_;
  const size_t limit = size_t(std::min(kListPerWanted * task.wanted, rows_.n) + kListSlack);
  task.max_limit = kListGrowth * limit;
  task.seen = 0;
  for (QueryState& state : task.state) state.start(limit);
  for (int64_t step = 0; step < steps; ++step) {
    if (samples && (step % kSparseSteps == 0) != (pass == Pass::kSparse)) continue;
    const int64_t first = task.g0 + step * kStep;
    const int64_t begin = std::min(pass == Pass::kOthers ? first + kPanelRows : first, task.g1);
    const int64_t end = std::min(first + (samples ? kPanelRows : kStep), task.g1);
    check_interrupt();
    if (!any_searched(begin, end)) continue;
    for (int64_t q = 0; codes_ && q < task.queries; ++q) refresh(task, q);
    score_all(task, begin, end);
    if (codes_) scan(task, begin, end);
  }
}

// Returns a rank r: with p > 0.999 the k-th best score of all rows is at least the r-th best score in the sample. A
// sample of this fraction of all rows holds a binomial number of the k best. In fewer than one in 10^3 searches it
// exceeds its mean by kSigmas standard deviations and kRankSlack. A larger rank would let more rows pass for every
// query, which costs more than repeating one search in 10^3.
int64_t Search::rank_in(double fraction) const {
  const double expected = double(k_) * std::min(1.0, fraction);
  return std::min(k_, int64_t(expected + double(kSigmas) * std::sqrt(expected)) + kRankSlack);
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

// Updates a query's cutoff from the best scores so far, of this task and of the others.
void Search::refresh(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  TopK& best = task.best[size_t(q)];
  raise(task.highest[size_t(q)], best.kth_score());
  const float any = std::max(state.speculative_cutoff, task.highest[size_t(q)].load(std::memory_order_relaxed));
  if (any == state.cutoff_score) return;
  state.cutoff_score = any;
  state.cutoff = task.codes->cutoff(q, any);
}

// Scores all rows [begin, end) for the queries whose bounds exclude too few rows there.
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
  // rows that fit into 256 KiB of L2
  const int64_t panel = std::clamp<int64_t>(65536 / std::max<int64_t>(1, d), 16, 512);
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

// score_all() for a mask that leaves most rows out: scores only the other rows.
void Search::score_searched(Task& task, int64_t begin, int64_t end) {
  std::vector<BoundedRow>& rows = task.searched;
  rows.clear();
  for (int64_t g = begin; g < end; ++g)
    if (rows_.is_searched(g)) rows.push_back({0.f, uint32_t(g - task.g0)});
  for (const int64_t q : task.dense) {
    check_interrupt();
    score(task, q, rows.data(), rows.data() + rows.size());
  }
}

// Does the first pass over rows [begin, end) for the queries that score_all() left out.
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
        state.candidates.pending.push_back(
            {task.upper[size_t(q * kPanelRows + bit)] + more, uint32_t(g - task.g0 + bit)});
      }
      if (state.candidates.pending.size() >= state.limit) rescore(task, q);
    }
  }
}

// Scores the best candidates of query q, and all others too if too many remain.
void Search::rescore(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  CandidateList& list = state.candidates;
  prune(task, q);
  if (list.pending.size() < state.limit / 2) return;
  list.take_best(task.wanted, task.selection);
  score_and_clear(task, q, list.best);
  prune(task, q);
  if (list.pending.size() < state.limit / 2) {
    state.limit = std::min(2 * state.limit, task.max_limit);
    return;
  }
  // Before k rows are scored every row passes, which is no evidence about the bounds.
  const bool most_pass =
      state.cutoff > -kInfinity && int64_t(list.pending.size()) > (task.seen - state.rescored_at) / kMostPass;
  if (!most_pass && state.limit < task.max_limit) {
    state.limit *= 2;
    return;
  }
  score_and_clear(task, q, list.pending);
  state.rescored_at = task.seen;
  if (most_pass) {
    state.rescored_at = state.dense_until = task.seen + state.dense_rows;
    state.dense_rows *= 2;
    state.limit = task.max_limit / kListGrowth;
  }
  prune(task, q);
}

// Raises the cutoff by the scores so far, and drops the candidates below it.
void Search::prune(Task& task, int64_t q) {
  QueryState& state = task.state[size_t(q)];
  if (task.wanted < k_)
    state.speculative_cutoff = std::max(state.speculative_cutoff, task.best[size_t(q)].nth_score(task.wanted));
  refresh(task, q);
  task.cutoff[size_t(q)] = state.cutoff;
  state.candidates.prune(state.cutoff);
}

void Search::score(Task& task, int64_t q, const BoundedRow* first, const BoundedRow* last) {
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

void Search::score_and_clear(Task& task, int64_t q, std::vector<BoundedRow>& list) {
  score(task, q, list.data(), list.data() + list.size());
  list.clear();
}

// Scores the best candidates of each query, and drops the candidates below the cutoff that follows.
void Search::score_best(Task& task) {
  for (int64_t q = 0; q < task.queries; ++q) {
    prune(task, q);
    CandidateList& list = task.state[size_t(q)].candidates;
    list.sort_by_row();
    list.take_best(task.wanted, task.selection);
  }
  score_in_windows(task, &CandidateList::best);
  for (int64_t q = 0; q < task.queries; ++q) prune(task, q);
}

// Scores one list of each query, window by window of the gallery. So a row in the lists of several queries is read from
// memory once, and addresses ascend.
void Search::score_in_windows(Task& task, std::vector<BoundedRow> CandidateList::* list) {
  size_t pairs = 0;
  for (QueryState& state : task.state) {
    pairs += (state.candidates.*list).size();
    state.next = 0;
  }
  if (pairs == 0) return;
  // Sixteen rows per query and window give the kernel enough to do in one call.
  const int64_t window = std::max<int64_t>(16, 16 * task.queries * (task.g1 - task.g0) / int64_t(pairs));
  for (int64_t g = 0; g < task.g1 - task.g0; g += window) {
    check_interrupt();
    for (int64_t q = 0; q < task.queries; ++q) {
      QueryState& state = task.state[size_t(q)];
      const std::vector<BoundedRow>& rows = state.candidates.*list;
      const size_t first = state.next;
      while (state.next < rows.size() && int64_t(rows[state.next].row) < g + window) ++state.next;
      if (first < state.next) score(task, q, rows.data() + first, rows.data() + state.next);
    }
  }
  for (QueryState& state : task.state) (state.candidates.*list).clear();
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
