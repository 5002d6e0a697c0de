// Tests the search with codes against all scores and one sort, bit for bit: several kinds of gallery, row types, ids,
// block sizes and numbers of threads.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "../../../csrc/cpu/parallel.h"
#include "../../../csrc/cpu/search.h"
#include "core.h"

using namespace simplexfix::cpu;

namespace {

// A score as dot.inc defines it: eight partial sums, added in one order.
float score(const float* a, const float* b, int64_t d) {
  double s[8] = {};
  for (int64_t j = 0; j < d; ++j) s[j % 8] += double(a[j]) * double(b[j]);
  return float(((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7])));
}

struct Ranked {
  simplexfix::Candidate candidate;
  int64_t row;
};

// All rows of the gallery for each query, the best first.
std::vector<std::vector<Ranked>> rank_all(const std::vector<float>& query, int64_t queries, const GalleryRows& rows) {
  std::vector<std::vector<Ranked>> all(static_cast<size_t>(queries));
  std::vector<float> scratch(static_cast<size_t>(rows.d));
  for (int64_t q = 0; q < queries; ++q) {
    std::vector<Ranked>& ranked = all[size_t(q)];
    for (int64_t i = 0; i < rows.n; ++i)
      ranked.push_back({{score(query.data() + q * rows.d, rows.read(i, scratch.data()), rows.d), rows.id(i)}, i});
    std::sort(ranked.begin(), ranked.end(),
              [](const Ranked& a, const Ranked& b) { return simplexfix::ranks_before(a.candidate, b.candidate); });
  }
  return all;
}

// The k best of the rows that are searched.
Result by_definition(const std::vector<std::vector<Ranked>>& all, const GalleryRows& rows, int64_t k) {
  Result result(int64_t(all.size()), k);
  std::fill(result.scores.begin(), result.scores.end(), -INFINITY);
  std::fill(result.ids.begin(), result.ids.end(), -1);
  for (size_t q = 0; q < all.size(); ++q) {
    size_t at = q * size_t(k);
    for (const Ranked& ranked : all[q]) {
      if (at == (q + 1) * size_t(k)) break;
      if (!rows.is_searched(ranked.row)) continue;
      result.scores[at] = ranked.candidate.score;
      result.ids[at++] = ranked.candidate.id;
    }
  }
  return result;
}

Result through(const std::vector<float>& query, int64_t queries, const GalleryRows& rows, const GalleryCodes* codes,
               int64_t k, int64_t threads) {
  Search search(query.data(), queries, rows, codes, k, threads);
  parallel(search.tasks(), threads, [&](int64_t task) { search.run(task); });
  Result result(queries, k);
  parallel(queries, threads, [&](int64_t q) { search.write(q, q + 1, result.scores.data(), result.ids.data()); });
  return result;
}

std::vector<std::byte> stored(const std::vector<float>& rows, RowType type) {
  std::vector<std::byte> bytes(rows.size() * (type == RowType::kFloat ? 4 : 2));
  for (size_t i = 0; i < rows.size(); ++i)  // the upper half of a float is a bfloat16, rounded down
    if (type == RowType::kFloat)
      std::memcpy(bytes.data() + 4 * i, &rows[i], 4);
    else
      std::memcpy(bytes.data() + 2 * i, reinterpret_cast<const char*>(&rows[i]) + 2, 2);
  return bytes;
}

// Puts the rows nearest to row n / 2, which is a query, into the first panel of each 16: the sample is not
// representative.
void best_in_the_sample(std::vector<float>& rows, int64_t n, int64_t d, Random& random) {
  std::normal_distribution<double> normal;
  for (int64_t i = 0; i < n; ++i) {
    if (i % (16 * kPanelRows) >= kPanelRows || i == n / 2) continue;
    float* row = rows.data() + i * d;
    for (int64_t j = 0; j < d; ++j) row[j] = rows[size_t(n / 2 * d + j)] + float(1e-3 * normal(random));
    search_kernels().normalize_rows(row, d, row, d, 0, 1);
  }
}

// Rows with the largest sums of products that codes can have: all numbers of one magnitude, or two adjacent numbers and
// zeros. The queries are rows, so a sum that overflows loses the best row.
void test_largest_sums(Random& random) {
  const int64_t n = 1500, d = 75, queries = 12;
  std::vector<float> raw(size_t(n * d), 0.f), gallery(raw.size());
  for (int64_t i = 0; i < n; ++i)
    if (float* row = raw.data() + i * d; i % 2)
      for (int64_t j = 0; j < d; ++j) row[j] = random() % 2 ? 1.f : -1.f;
    else
      row[i % (d - 1)] = row[i % (d - 1) + 1] = i % 4 ? 1.f : -1.f;
  search_kernels().normalize_rows(raw.data(), d, gallery.data(), d, 0, n);
  const std::vector<float> query(gallery.end() - queries * d, gallery.end());
  const std::vector<std::byte> bytes = stored(gallery, RowType::kFloat);
  const std::byte* block = bytes.data();
  const GalleryRows rows{&block, 20, n, d, RowType::kFloat};
  GalleryCodes codes(d, central_row(rows));
  codes.resize(n);
  codes.encode(rows, 0, n);
  const std::vector<std::vector<Ranked>> all = rank_all(query, queries, rows);
  for (const int64_t k : {1, 5})
    check(through(query, queries, rows, &codes, k, 1) == by_definition(all, rows, k), "largest sums, k=%ld", long(k));
}

// A gallery's memory: panels never overlap, keep their place, and are freed.
void test_memory_of_codes() {
  const int64_t d = 1023, panel_bytes = kPanelRows * (1024 + 12);
  GalleryCodes codes(d, std::vector<float>(size_t(d), 0.f));
  const uint8_t* first = nullptr;
  // by one row, by small chunks, by chunks of huge pages and others, fewer, and by one row of a large gallery
  for (const int64_t panels : {1, 2, 40, 40 + 63 + 5, 30, 17 * 63, 17 * 63 + 1, 1}) {
    codes.resize(panels * kPanelRows - 5);
    std::vector<const uint8_t*> starts;
    for (int64_t p = 0; p < panels; ++p) starts.push_back(codes.panel(p).codes);
    check(!first || starts[0] == first, "%ld panels: the first has moved", long(panels));
    first = starts[0];
    check(starts.back()[0] == 128 && codes.panel(panels - 1).error[63] == 0, "%ld panels: unset", long(panels));
    std::sort(starts.begin(), starts.end());
    int64_t closest = panel_bytes;
    for (size_t i = 1; i < starts.size(); ++i) closest = std::min<int64_t>(closest, starts[i] - starts[i - 1]);
    check(closest == panel_bytes, "%ld panels: two overlap", long(panels));
    const auto bytes = int64_t(codes.bytes()), least = panels * panel_bytes;
    check(bytes >= least && bytes <= least + least / 16 + (1 << 19), "%ld panels: %ld bytes", long(panels),
          long(bytes));
  }
}
}  // namespace

void test_search(const Options& options) {
  Random random(1);
  test_largest_sums(random);
  if (!options.small) test_memory_of_codes();
  std::vector<std::pair<int64_t, int64_t>> sizes{{9000, 5}, {9000, 64}, {3000, 129}, {70, 7}, {0, 3}};
  if (options.small) sizes = {{9000, 17}};
  int turn = 0;
  for (const auto& [n, d] : sizes)
    for (const double spread : {1e3, 0.1, 1e-3, 1e-7, 0.0}) {  // around five centers
      std::vector<float> gallery = clusters(n, d, spread, random);
      if (spread == 0.1) best_in_the_sample(gallery, n, d, random);
      const int64_t queries = 9;
      std::vector<float> query = clusters(queries, d, 1, random);
      if (n) std::copy_n(gallery.begin() + n / 2 * d, 4 * d, query.begin());
      std::vector<int64_t> shuffled(static_cast<size_t>(n));
      std::iota(shuffled.begin(), shuffled.end(), 5);
      std::shuffle(shuffled.begin(), shuffled.end(), random);
      std::vector<int64_t> ascending = shuffled;
      std::sort(ascending.begin(), ascending.end());
      for (const RowType type : {RowType::kFloat, RowType::kBFloat16}) {
        const std::vector<std::byte> bytes = stored(gallery, type);
        const int shift = options.small ? 6 : 9;
        std::vector<const std::byte*> blocks;  // each is its own allocation, so that reads past it are detected
        std::vector<std::vector<std::byte>> memory;
        for (int64_t i = 0; i < n; i += int64_t(1) << shift)
          memory.emplace_back(bytes.begin() + i * row_bytes(type, d),
                              bytes.begin() + std::min(n, i + (int64_t(1) << shift)) * row_bytes(type, d));
        for (const auto& block : memory) blocks.push_back(block.data());
        GalleryRows rows{blocks.data(), shift, n, d, type};
        GalleryCodes codes(d, central_row(rows));
        for (int64_t at = 0; at < n;) {  // pieces that end within panels
          const int64_t end = std::min<int64_t>(n, at + 1 + int64_t(random() % 3000));
          codes.resize(end);
          codes.encode(rows, at, end);
          at = end;
        }
        // each kind of ids in turn: none, ascending, in any order
        std::vector<int64_t>* const kinds[] = {nullptr, &ascending, &shuffled};
        const int kind = turn++ % 3;
        rows.ids = kind ? kinds[kind]->data() : nullptr;
        const int64_t most = std::max<int64_t>(1, n / 4);
        const std::vector<std::vector<Ranked>> all = rank_all(query, queries, rows);
        for (const int64_t k : {int64_t(1), int64_t(10), most, most + 3})
          for (const int64_t threads : {1, 4}) {
            if (options.small && threads == 1) continue;
            check(through(query, queries, rows, &codes, k, threads) == by_definition(all, rows, k),
                  "n=%ld d=%ld spread=%g %s ids %d k=%ld threads=%ld", long(n), long(d), spread,
                  type == RowType::kFloat ? "float" : "bfloat16", kind, long(k), long(threads));
            for (const int64_t few : {1, 2}) {  // one or two queries have a kernel of their own
              const std::vector<std::vector<Ranked>> first(all.begin(), all.begin() + few);
              check(through(query, few, rows, &codes, k, threads) == by_definition(first, rows, k),
                    "n=%ld d=%ld spread=%g %s ids %d k=%ld threads=%ld, %ld queries", long(n), long(d), spread,
                    type == RowType::kFloat ? "float" : "bfloat16", kind, long(k), long(threads), long(few));
            }
          }
        // Each way to search a subset: without codes; with codes, and dense queries by score_searched(); with codes,
        // and dense queries by tiles; rows that are never in the sample.
        for (const double fraction : {0.02, 0.3, 0.8, 2.0}) {
          std::vector<uint64_t> mask(size_t(simplexfix::ceil_div(n, kPanelRows)), 0);
          rows.searched = 0;
          for (int64_t i = 0; i < n; ++i)
            if (fraction > 1 ? i % (16 * kPanelRows) >= kPanelRows : double(random()) < fraction * 0x1p32) {
              mask[size_t(i / kPanelRows)] |= uint64_t(1) << (i % kPanelRows);
              ++rows.searched;
            }
          rows.mask = mask.data();
          for (const int64_t k : {int64_t(1), int64_t(10), most + 3})
            check(through(query, queries, rows, &codes, k, 4) == by_definition(all, rows, k),
                  "n=%ld d=%ld spread=%g %s ids %d k=%ld of a subset, %g", long(n), long(d), spread,
                  type == RowType::kFloat ? "float" : "bfloat16", kind, long(k), fraction);
        }
      }
    }
}
