// Tests csrc/cuda/cosine_topk against the definition: all scores and one sort. Scores and ids must have the same bits,
// whatever the first pass left out.
#include <algorithm>
#include <functional>
#include <memory>

#include "check.h"
#include "tests.h"

namespace {
using simplexfix::cuda::TopkLimits;
using Rows = std::vector<float>;  // [n, d]

// Rows divided by their norms; sums in the order that docs/design/numerics.md states.
double sum_of_products(const float* a, const float* b, int64_t d) {
  double partial[8] = {};
  for (int64_t j = 0; j < d; ++j) partial[j % 8] += double(a[j]) * double(b[j]);
  return ((partial[0] + partial[4]) + (partial[2] + partial[6])) +
         ((partial[1] + partial[5]) + (partial[3] + partial[7]));
}
Rows normalized(const Rows& rows, int64_t d) {
  Rows unit(rows.size());
  for (size_t at = 0; at < rows.size(); at += size_t(d)) {
    const double norm = std::sqrt(sum_of_products(&rows[at], &rows[at], d));
    for (size_t j = at; j < at + size_t(d); ++j) unit[j] = norm > 0 ? float(double(rows[j]) / norm) : 0.f;
  }
  return unit;
}

struct Found {
  float score;
  int64_t id;
};
std::vector<Found> truth_of(const float* query, const Rows& gallery, int64_t n, int64_t d, int64_t k) {
  std::vector<Found> all(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) all[size_t(i)] = {float(sum_of_products(query, &gallery[size_t(i * d)], d)), i};
  std::sort(all.begin(), all.end(),
            [](const Found& a, const Found& b) { return a.score != b.score ? a.score > b.score : a.id < b.id; });
  all.resize(size_t(k), {-INFINITY, -1});
  return all;
}

struct Case {
  const char* name;
  int64_t queries, n, d, k;
  TopkLimits limits{};
  int64_t query_more = 0, row_more = 0;  // strides minus d
  int offset = 0;                        // of both buffers, in elements
};

// Copies rows to a layout that a tensor may have: from an unaligned address on, with nan between them. The buffer ends
// with the last row.
std::unique_ptr<Buffer<float>> laid_out(const Rows& rows, int64_t d, int64_t stride, int offset) {
  const int64_t n = int64_t(rows.size()) / d;
  auto buffer = std::make_unique<Buffer<float>>(n ? (n - 1) * stride + d : 0, offset);
  for (int64_t i = 0; i < n; ++i) std::copy_n(&rows[size_t(i * d)], d, buffer->data() + i * stride);
  return buffer;
}

void check_search(const Case& c, const Rows& query, const Rows& gallery) {
  ++g_cases;
  const int64_t query_stride = c.d + c.query_more, row_stride = c.d + c.row_more;
  const auto query_rows = laid_out(query, c.d, query_stride, c.offset);
  const auto gallery_rows = laid_out(gallery, c.d, row_stride, c.offset);
  Buffer<float> scores(c.queries * c.k, 0);
  Buffer<int64_t> ids(c.queries * c.k, 0);
  simplexfix::cuda::CosineTopkArgs args{query_rows->data(),
                                        gallery_rows->data(),
                                        query_stride,
                                        row_stride,
                                        c.queries,
                                        c.n,
                                        c.d,
                                        c.k,
                                        scores.data(),
                                        ids.data(),
                                        simplexfix::cuda::plan_cosine_topk(c.queries, c.n, c.d, c.k, c.limits),
                                        {},
                                        nullptr};
  std::vector<std::unique_ptr<Buffer<unsigned char>>> memory;
  for (int i = 0; i < simplexfix::cuda::kTopkBuffers; ++i) {
    memory.push_back(std::make_unique<Buffer<unsigned char>>(args.plan.bytes[i], 0));
    args.buffers[i] = args.plan.bytes[i] ? memory.back()->data() : nullptr;
  }
  if (const char* error = simplexfix::cuda::cosine_topk(args)) failed("launch: %s", error);

  const Rows unit_query = normalized(query, c.d), unit_gallery = normalized(gallery, c.d);
  const auto finite = [](float x) { return std::isfinite(x); };
  const bool broken = !std::all_of(gallery.begin(), gallery.end(), finite);
  for (int64_t q = 0; q < c.queries; ++q) {
    const float* row = &query[size_t(q * c.d)];
    const bool refused = broken || !std::all_of(row, row + c.d, finite);
    std::vector<Found> truth(size_t(c.k), {NAN, -1});
    if (!refused) truth = truth_of(&unit_query[size_t(q * c.d)], unit_gallery, c.n, c.d, c.k);
    for (int64_t i = 0; i < c.k; ++i) {
      const Found &want = truth[size_t(i)], got{scores[q * c.k + i], ids[q * c.k + i]};
      const bool same = refused ? std::isnan(got.score) : !std::memcmp(&got.score, &want.score, sizeof(float));
      if (!same || got.id != want.id)
        failed(
            "%s, %lld x %lld x %lld, k %lld, offset %d: query %lld, place %lld is %.9g of row %lld, truth %.9g of %lld",
            c.name, (long long)c.queries, (long long)c.n, (long long)c.d, (long long)c.k, c.offset, (long long)q,
            (long long)i, double(got.score), (long long)got.id, double(want.score), (long long)want.id);
    }
  }
  if (!scores.surroundings_untouched() || !ids.surroundings_untouched()) failed("%s: wrote outside results", c.name);
  for (const auto& buffer : memory)
    if (!buffer->surroundings_untouched()) failed("%s: wrote outside its memory", c.name);
}

Rows normal_rows(int64_t n, int64_t d, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Rows rows(size_t(n * d));
  for (float& x : rows) x = normal(random);
  return rows;
}

void check_normal(const Case& c) {
  Rows query = normal_rows(c.queries, c.d, 1), gallery = normal_rows(c.n, c.d, 2);
  if (c.n > 3) std::fill_n(&gallery[size_t(2 * c.d)], c.d, 0.f);  // a zero row: score 0
  if (c.queries > 3) std::fill_n(&query[size_t(3 * c.d)], c.d, 0.f);
  check_search(c, query, gallery);
}

// Classes of rows that differ by noise. With noise 0 the rows of a class are equal, so that ids decide.
void check_classes(const Case& c, int64_t classes, float noise) {
  const Rows centers = normal_rows(classes, c.d, 3);
  Rows query = normal_rows(c.queries, c.d, 4), gallery = normal_rows(c.n, c.d, 5);
  const auto around = [&](Rows& rows) {
    for (size_t at = 0; at < rows.size(); ++at)
      rows[at] = centers[at / size_t(c.d) % size_t(classes) * size_t(c.d) + at % size_t(c.d)] + noise * rows[at];
  };
  around(query);
  around(gallery);
  check_search(c, query, gallery);
}

// Rounding to bfloat16 makes the worse row look better, by nearly the whole bound of the query or of the row. All
// numbers of a are u, which is rounded down. Those of b are exact, and a little smaller on average.
void check_misleading(bool query_is_rounded) {
  constexpr int64_t d = 40, n = 8;
  constexpr float u = 1.0039f, exact[2] = {1.f, 1.0078125f};  // u is just below their midpoint
  std::vector<float> a(16, u), b(16);
  for (int j = 0; j < 16; ++j) b[size_t(j)] = exact[j < 7];
  const auto complement = [](const std::vector<float>& x, double length) {  // the number that extends x to this length
    double squares = 0;
    for (float y : x) squares += double(y) * double(y);
    return float(std::sqrt(length * length - squares));
  };
  Rows query(d, 0.f), gallery(size_t(n * d), 0.f);
  for (int64_t i = 2; i < n; ++i) gallery[size_t(i * d + 39)] = -1;
  if (query_is_rounded) {
    std::copy(a.begin(), a.end(), &query[0]);
    std::copy(b.begin(), b.end(), &query[16]);
    std::vector<float> both(query.begin(), query.end());
    query[32] = complement(both, 8);
    std::fill_n(&gallery[d], 16, 1.f);  // row 1 is the nearest
    std::fill_n(&gallery[16], 16, 1.f);
  } else {
    std::fill_n(&query[0], 16, 1.f);
    std::copy(a.begin(), a.end(), &gallery[d]);
    gallery[d + 32] = complement(a, 8);
    std::copy(b.begin(), b.end(), &gallery[0]);
    gallery[33] = complement(b, 8);
  }
  check_search({query_is_rounded ? "misleading query" : "misleading row", 1, n, d, 1}, query, gallery);
}

}  // namespace

void test_topk(const Selection& selection) {
  if (!selection.has("float")) return;
  const bool small = selection.small;
  const int64_t few = small ? 1 : 3;  // queries
  const TopkLimits few_splits{2, 256, 1 << 20}, short_lists{2, 64, 1 << 20};
  // columns: one, ends of vectors and of panels; rows with gaps and at unaligned addresses
  int turn = 0;
  for (int64_t d : {1, 7, 8, 9, 31, 33, 128, 1023}) {
    if (small && d != 9 && d != 33) continue;
    ++turn;
    check_normal({"normal", 3, d > 100 ? 65 : 130, d, 5, few_splits, turn % 3, turn % 2, turn % 4});
  }
  // galleries: none, one, less than a tile; k past the end; no first pass
  for (int64_t n : {0, 1, 5, 33})
    if (!small || n == 33) check_normal({"few rows", 3, n, 9, n == 33 ? 33 : 7, {}, 1, 2, 3});
  check_normal({"no queries", 0, 40, 9, 3});
  check_normal({"no first pass, more rows than a list holds", 2, 300, 9, 80, short_lists});
  // several tiles of queries, several rows to a bucket; chunks of queries
  check_normal({"tiles", small ? 66 : 130, small ? 300 : 1000, 33, 7, few_splits});
  check_normal({"chunks", 67, 150, 9, 3, {1, 64, 64 * (64 * 4 + 64 * 16)}});
  if (!small) check_normal({"many results", 1, 8300, 8, 2048});
  // ties; nearly all rows pass, within the lists and past their end
  for (const TopkLimits& limits : {few_splits, short_lists}) {
    check_classes({"duplicates", few, 300, 17, 10, limits}, 20, 0);
    if (!small) check_classes({"all equal", 2, 300, 17, 10, limits}, 1, 0);
    check_classes({"collapsed classes", few, 300, 17, 10, limits}, 2, 3e-3f);
  }
  check_misleading(true);
  check_misleading(false);
  // a sum that cancels: in any other order of the eight partial sums no digit of it would remain
  check_search({"order of the sums", 1, 1, 8, 1}, {1, 1e-10f, 0, 0, 1, 0, 0, 0}, {1, 1e-10f, 0, 0, -1, 0, 0, 0});
  // nan and inf: in a query they spoil its own results, in the gallery all results
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    if (small && !std::isnan(bad)) continue;
    Rows query = normal_rows(3, 9, 6), gallery = normal_rows(100, 9, 7);
    query[9 + 8] = bad;
    check_search({"nan in a query", 3, 100, 9, 4}, query, gallery);
    query[9 + 8] = 0;
    gallery[99 * 9 + 4] = bad;
    check_search({"nan in the gallery", 3, 100, 9, 4}, query, gallery);
  }
}
