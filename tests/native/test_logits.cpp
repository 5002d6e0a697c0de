// Tests csrc/cuda/simplex_logits and scale_rows against the long double reference.
#include "../../csrc/cuda/kernels.h"
#include "check.h"
#include "reference.h"
#include "tests.h"

namespace {
using simplexfix::accumulate_t;

template <typename T>
void fill(Buffer<T>* buffer, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, 2);
  for (int64_t i = 0; i < buffer->size(); ++i) (*buffer)[i] = T(normal(random));
}

template <typename T>
void check_values(const char* name, const T* ours, const std::vector<long double>& truth, double slack) {
  for (size_t j = 0; j < truth.size(); ++j) {
    const double got = value_of(ours[j]), want = double(truth[j]);
    if (!(std::fabs(got - want) <= slack + rounding_of<T>(want)))
      failed("%s: [%zu] = %.9g, truth %.9g, allowed error %g", name, j, got, want, slack + rounding_of<T>(want));
  }
}

template <typename T>
void check_logits(int64_t rows, int64_t d, int64_t stride, int offset, bool normalize) {
  using A = accumulate_t<T>;
  ++g_cases;
  const double scale = normalize ? 12 : 1.5;
  Buffer<T> z(rows ? (rows - 1) * stride + d : 0, offset), out(rows * (d + 1), 0), g(rows * (d + 1), 0),
      back(rows * d, 0);
  fill(&z, unsigned(d));
  fill(&g, unsigned(d) + 1);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t j = d; j < stride && b + 1 < rows; ++j) z[b * stride + j] = T(NAN);  // padding: must not be read
    for (int64_t j = 0; b % 5 == 3 && j < d; ++j) z[b * stride + j] = T(0.f);
  }
  simplexfix::cuda::LogitsArgs args{
      z.data(),      stride, nullptr, out.data(), rows, d, normalize, scale, simplexfix::Simplex::of_dimension(d),
      dtype_of<T>(), nullptr};
  if (const char* error = simplexfix::cuda::simplex_logits(args)) failed("launch: %s", error);
  args.logits_gradient = g.data();
  args.out = back.data();
  if (const char* error = simplexfix::cuda::simplex_logits_backward(args)) failed("launch: %s", error);

  const reference::Simplex<long double> simplex(d);
  const reference::Simplex<A> simplex_naive(d);
  for (int64_t b = 0; b < rows; ++b) {
    char name[160];
    std::snprintf(name, sizeof name, "logits<%s>%s, %lld x %lld, stride %lld, offset %d, row %lld", Format<T>::kName,
                  normalize ? " normalize" : "", (long long)rows, (long long)d, (long long)stride, offset,
                  (long long)b);
    const T *z_row = z.data() + b * stride, *g_row = g.data() + b * (d + 1);
    const auto wide = widened<long double>(z_row, d), wide_g = widened<long double>(g_row, d + 1);
    const auto narrow = widened<A>(z_row, d), narrow_g = widened<A>(g_row, d + 1);
    const auto truth = reference::logits(simplex, normalize, scale, wide);
    const auto naive = reference::logits(simplex_naive, normalize, scale, narrow);
    check_values(name, out.data() + b * (d + 1), truth,
                 2 * largest_difference(naive, truth) + floor_of<A>(double(reference::largest(truth))));
    long double plain;
    A plain_naive;
    const auto truth_back = reference::logits_backward(simplex, normalize, scale, wide, wide_g, &plain);
    const auto naive_back = reference::logits_backward(simplex_naive, normalize, scale, narrow, narrow_g, &plain_naive);
    std::strcat(name, ", backward");
    check_values(name, back.data() + b * d, truth_back,
                 2 * largest_difference(naive_back, truth_back) + floor_of<A>(double(plain)));
  }
  if (!out.surroundings_untouched() || !back.surroundings_untouched()) failed("logits: wrote outside its results");
}

template <typename T>
void check_scale(int64_t rows, int64_t cols, int offset, bool by_row, bool ones, accumulate_t<T> divisor = 1) {
  using A = accumulate_t<T>;
  ++g_cases;
  Buffer<T> in(rows * cols, offset), out(rows * cols, offset % 2);
  Buffer<A> factor(by_row ? rows : 1, 0);
  fill(&in, unsigned(cols));
  if (in.size() > 2) in[in.size() / 2] = T(-0.f);
  std::mt19937 random(unsigned(rows) + 3);
  for (int64_t i = 0; i < factor.size(); ++i) factor[i] = ones ? A(1) : A(float(random() % 4096) / 1000);
  if (const char* error =
          simplexfix::cuda::scale_rows({in.data(), factor.data(), by_row ? 1 : 0, divisor == 1 ? nullptr : &divisor,
                                        out.data(), rows, cols, dtype_of<T>(), nullptr}))
    failed("launch: %s", error);
  for (int64_t i = 0; i < in.size(); ++i) {
    const A upstream = factor[by_row ? i / cols : 0];
    const T want = T(A(in[i]) * (divisor == 0 ? upstream : upstream / divisor));
    if (std::memcmp(&out[i], ones ? &in[i] : &want, sizeof(T)))
      failed("scale_rows<%s> %lld x %lld, offset %d%s: [%lld] = %.9g, want %.9g", Format<T>::kName, (long long)rows,
             (long long)cols, offset, by_row ? ", by row" : "", (long long)i, value_of(out[i]), value_of(want));
  }
  if (!out.surroundings_untouched()) failed("scale_rows: wrote outside its results");
}

template <typename T>
void logits_of(bool small) {
  int turn = 0;
  for (int64_t d : {1, 2, 7, 8, 9, 31, 33, 130, 256, 257, 1023, 1024, 4097})
    for (bool normalize : {false, true}) {
      if (small && d != 9 && d != 257) continue;
      ++turn;
      check_logits<T>(d > 256 ? 4 : 37, d, d + turn % 3, turn % 4, normalize);
    }
  check_logits<T>(0, 3, 3, 0, true);
  check_logits<T>(1, 3, 3, 1, true);
}

template <typename T>
void scale_of(bool small) {
  for (int64_t cols : {1, 2, 7, 8, 9, 33, 1023, 1024, 4097})
    for (int offset : {0, 1, 2}) {
      if (small && cols != 9 && cols != 4097) continue;
      check_scale<T>(5, cols, offset, true, false);
      check_scale<T>(5, cols, offset, false, offset == 2);
    }
  check_scale<T>(0, 4, 0, true, false);
  check_scale<T>(5, 33, 1, false, false, 48.5);
  check_scale<T>(5, 33, 1, false, false, 0);  // no row counts
}
}  // namespace

void test_logits(const Selection& selection) {
  if (selection.has("float")) logits_of<float>(selection.small);
  if (selection.has("double")) logits_of<double>(selection.small);
  if (selection.has("half")) logits_of<__half>(selection.small);
  if (selection.has("bfloat16")) logits_of<__nv_bfloat16>(selection.small);
}

void test_scale_rows(const Selection& selection) {
  if (selection.has("float")) scale_of<float>(selection.small);
  if (selection.has("double")) scale_of<double>(selection.small);
  if (selection.has("half")) scale_of<__half>(selection.small);
  if (selection.has("bfloat16")) scale_of<__nv_bfloat16>(selection.small);
}
