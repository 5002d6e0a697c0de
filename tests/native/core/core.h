// Shared code of the tests of the CPU core.
#pragma once
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <random>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

struct Options {
  bool small = false;  // one shape, always with threads: for ThreadSanitizer
};
using Random = std::mt19937;

inline int g_cases = 0, g_failures = 0;

// Counts a case, and prints the first few failures.
__attribute__((format(printf, 2, 3))) inline void check(bool passed, const char* format, ...) {
  ++g_cases;
  if (passed || ++g_failures > 8) return;
  std::printf("FAIL ");
  va_list arguments;
  va_start(arguments, format);
  std::vprintf(format, arguments);
  va_end(arguments);
  std::printf("\n");
}

struct Result {
  int64_t k;
  std::vector<float> scores;
  std::vector<int64_t> ids;
  Result(int64_t queries, int64_t most) : k(most), scores(size_t(queries * most)), ids(size_t(queries * most)) {}
  Result first(int64_t some) const {
    Result result(int64_t(ids.size()) / k, some);
    for (size_t i = 0; i < result.ids.size(); ++i) {
      const size_t from = i / size_t(some) * size_t(k) + i % size_t(some);
      result.scores[i] = scores[from];
      result.ids[i] = ids[from];
    }
    return result;
  }
  bool operator==(const Result&) const = default;
};

// Normalised rows around five centers; most belong to the first center.
inline std::vector<float> clusters(int64_t n, int64_t d, double spread, Random& random) {
  std::normal_distribution<double> normal;
  std::vector<double> centers(size_t(5 * d));
  for (double& x : centers) x = normal(random);
  std::vector<float> raw(static_cast<size_t>(n * d)), rows(raw.size());
  for (int64_t i = 0; i < n; ++i) {
    const double* center = centers.data() + (random() % 8 ? 0 : random() % 5) * size_t(d);
    for (int64_t j = 0; j < d; ++j) raw[size_t(i * d + j)] = float(center[j] + spread * normal(random));
  }
  simplexfix::cpu::search_kernels().normalize_rows(raw.data(), d, rows.data(), d, 0, n);
  return rows;
}

void test_parallel(const Options&);
void test_search(const Options&);
void test_index(const Options&);
void test_losses(const Options&);
