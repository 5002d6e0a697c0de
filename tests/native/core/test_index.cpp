// Tests CosineIndex: rows are added, removed and saved, by one thread and by several at a time.
#include <unistd.h>

#include <algorithm>
#include <map>
#include <string>
#include <thread>

#include "../../../csrc/cpu/cosine_index.h"
#include "../../../csrc/cpu/interrupt.h"
#include "core.h"

using namespace simplexfix::cpu;

namespace {

Result search(const CosineIndex& index, const std::vector<float>& query, int64_t k,
              std::optional<Selection> selection = {}) {
  const int64_t queries = int64_t(query.size()) / index.dim();
  Result result(queries, k);
  index.search(query.data(), queries, k, result.scores.data(), result.ids.data(), selection ? &*selection : nullptr);
  return result;
}

std::string temporary_path() { return "/tmp/simplexfix-core-test-" + std::to_string(::getpid()); }

template <typename Error, typename Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

// Additions, removals and rejected changes in random order. After each, the index must equal one built from the
// remaining rows.
void test_changes(RowType type, Random& random) {
  const int64_t d = 13;
  const std::vector<float> pool = clusters(4000, d, 0.3, random), query = clusters(5, d, 0.3, random);
  CosineIndex index(d, type, 3);
  std::map<int64_t, int64_t> row_of;  // id -> row in the pool
  int64_t used = 0;
  for (int step = 0; step < 40; ++step) {
    std::vector<int64_t> ids;
    const int64_t n = std::min<int64_t>(1 + int64_t(random() % 300), 4000 - used);
    if (random() % 3 && n > 0) {
      while (int64_t(ids.size()) < n) {
        const auto id = int64_t(random() % 100000);
        if (row_of.emplace(id, used + int64_t(ids.size())).second) ids.push_back(id);
      }
      index.add(pool.data() + used * d, n, ids.data());
      used += n;
    } else if (!row_of.empty()) {
      const size_t one_in = 1 + random() % 4;
      for (const auto& [id, row] : row_of)
        if (random() % one_in == 0) ids.push_back(id);
      std::shuffle(ids.begin(), ids.end(), random);
      index.remove(ids.data(), int64_t(ids.size()));
      for (const int64_t id : ids) row_of.erase(id);
    }
    if (!row_of.empty()) {
      const int64_t wrong[] = {100001, row_of.begin()->first};
      check(throws<std::invalid_argument>([&] { index.add(pool.data(), 2, wrong); }), "an id twice is taken");
      check(throws<std::out_of_range>([&] { index.remove(wrong, 2); }), "an unknown id is removed");
    }
    CosineIndex rebuilt(d, type, 1);
    for (const auto& [id, row] : row_of) rebuilt.add(pool.data() + row * d, 1, &id);
    check(index.size() == int64_t(row_of.size()), "step %d: %ld rows, expected %zu", step, long(index.size()),
          row_of.size());
    check(search(index, query, 20) == search(rebuilt, query, 20), "step %d differs from a new index", step);
    CosineIndex half(d, type, 1);
    std::vector<int64_t> taken, others;
    for (const auto& [id, row] : row_of) (random() % 2 ? taken : others).push_back(id);
    for (const int64_t id : taken) half.add(pool.data() + row_of[id] * d, 1, &id);
    const Result expected = search(half, query, 20);
    others.push_back(100001);  // ignored
    check(search(index, query, 20, Selection{taken.data(), int64_t(taken.size()), false}) == expected,
          "step %d: a search of half of the ids", step);
    check(search(index, query, 20, Selection{others.data(), int64_t(others.size()), true}) == expected,
          "step %d: a search of all but half of the ids", step);
    check(throws<std::out_of_range>([&] { search(index, query, 20, Selection{&others.back(), 1, false}); }),
          "an unknown id is searched");
    const IndexRows rows = index.rows();
    std::vector<float> vectors(rows.vectors.size());
    index.vectors(rows.ids.data(), int64_t(rows.ids.size()), vectors.data());
    check(rows.ids == index.ids() && rows.vectors == vectors && row_of.size() == rows.ids.size(), "step %d: rows",
          step);
  }
  index.save(temporary_path());
  check(search(*CosineIndex::load(temporary_path(), 2), query, 20) == search(index, query, 20), "loaded one differs");
  ::unlink(temporary_path().c_str());
}

// Two threads search and one saves while another adds and removes. ThreadSanitizer finds races. Each result must be
// that of the index between two changes.
void test_threads(Random& random) {
  const int64_t d = 24, n = 6000, step = 1000;
  const std::vector<float> pool = clusters(n, d, 0.3, random), query = clusters(4, d, 0.3, random);
  CosineIndex index(d, RowType::kBFloat16, 2);
  std::vector<Result> states;
  std::vector<int64_t> ids(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) ids[size_t(i)] = (i * 7919) % 100003;
  for (int64_t i = 0; i <= n; i += step) {
    states.push_back(search(index, query, 30));
    if (i < n) index.add(pool.data() + i * d, step, ids.data() + i);
  }
  std::atomic<bool> running{true};
  std::atomic<int> strange{0};
  const auto searches = [&] {
    while (running) strange += std::find(states.begin(), states.end(), search(index, query, 30)) == states.end();
  };
  const std::string path = temporary_path();
  std::vector<std::thread> threads;
  threads.emplace_back(searches);
  threads.emplace_back(searches);
  threads.emplace_back([&] {
    while (running) {
      index.save(path);
      strange += CosineIndex::load(path, 2)->size() % step != 0;
      strange += index.bytes() == 0;
    }
  });
  for (int round = 0; round < 2; ++round) {
    for (int64_t i = n - step; i >= 0; i -= step) index.remove(ids.data() + i, step);
    for (int64_t i = 0; i < n; i += step) index.add(pool.data() + i * d, step, ids.data() + i);
  }
  running = false;
  for (std::thread& thread : threads) thread.join();
  check(strange == 0, "%d results were of no state that the index had", int(strange));
  ::unlink(path.c_str());
}

// A call that takes longer than the interval is interrupted, and changes nothing.
void test_interrupts(Random& random) {
  const int64_t d = 24, n = 6000, many = 100'000, more = 6'000'000;
  const std::vector<float> pool = clusters(n, d, 0.3, random), query = clusters(4, d, 0.3, random);
  std::vector<float> queries, vectors(static_cast<size_t>(more), 1.f);
  for (int64_t i = 0; i < many; ++i) queries.insert(queries.end(), query.begin(), query.begin() + d);
  std::vector<int64_t> ids(static_cast<size_t>(more));
  for (int64_t i = 0; i < more; ++i) ids[size_t(i)] = (more - i) * 2;
  for (const int64_t threads : {1, 4}) {
    CosineIndex index(d, RowType::kFloat, threads), numbers(1, RowType::kFloat, threads);
    index.add(pool.data(), n, nullptr);
    numbers.add(vectors.data(), 3, nullptr);
    const Result before = search(index, query, 30);
    set_interrupt_check([] { return true; });
    check(throws<Interrupted>([&] { search(index, queries, 30); }), "a search goes on");
    check(throws<Interrupted>([&] { numbers.add(vectors.data(), more, ids.data()); }), "an addition goes on");
    set_interrupt_check([] { return false; });
    check(search(index, query, 30) == before, "a search after an interrupt differs");
    check(numbers.size() == 3 && numbers.add(vectors.data(), 1, nullptr) == 3,
          "an interrupted addition left something");
    set_interrupt_check(nullptr);
  }
}

}  // namespace

void test_index(const Options& options) {
  Random random(2);
  if (!options.small)
    for (const RowType type : {RowType::kFloat, RowType::kBFloat16}) test_changes(type, random);
  test_threads(random);
  test_interrupts(random);
}
