// Tests the kernels of the losses against the definitions in double: every number format, tails, tiles, non-temporal
// stores, and the same bits on several threads. Buffers end exactly where the kernels must stop.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>

#include "../../../csrc/core/exponential.h"
#include "../../../csrc/cpu/matrix_product.h"
#include "../../../csrc/cpu/parallel.h"
#include "core.h"

using namespace simplexfix;
using namespace simplexfix::cpu;

namespace {

#ifdef __aarch64__
using CompilersHalf = __fp16;  // on aarch64, gcc 12 has no _Float16 in C++
#else
using CompilersHalf = _Float16;
#endif

// Conversions between the formats and float. to() rounds to 16 bits; the tests read the rounded inputs back.
float value_of(float x) { return x; }
double value_of(double x) { return x; }
float value_of(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float value_of(Half x) { return float(*reinterpret_cast<const CompilersHalf*>(&x.bits)); }
template <typename T>
T to(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t(bits >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const auto h = static_cast<CompilersHalf>(x);
    T out;
    std::memcpy(&out, &h, 2);
    return out;
  } else {
    return T(x);
  }
}
template <typename T>
constexpr double kUnit = std::is_same_v<T, double>     ? 0x1p-52
                         : std::is_same_v<T, float>    ? 0x1p-23
                         : std::is_same_v<T, BFloat16> ? 0x1p-8
                                                       : 0x1p-10;

enum class Polytope { kSimplex, kOrthoplex, kCube };
const char* const kNames[] = {"simplex", "orthoplex", "cube"};

// Replaces the logits by exp(l) / sum of exp(l) minus the smoothed target, and returns the loss.
double softmax_gradient(std::vector<double>& logits, int64_t label, double smoothing) {
  const double largest = *std::max_element(logits.begin(), logits.end()), slots = double(logits.size());
  double total = 0, mean = 0;
  for (double l : logits) total += std::exp(l - largest), mean += l / slots;
  const double logsumexp = largest + std::log(total), own = logits[size_t(label)];
  for (size_t c = 0; c < logits.size(); ++c)
    logits[c] = std::exp(logits[c] - logsumexp) - smoothing / slots - (int64_t(c) == label) * (1 - smoothing);
  return (1 - smoothing) * (logsumexp - own) + smoothing * (logsumexp - mean);
}

// Computes the loss and the gradient of one row from the vertices. A cube has too many: it takes sums over coordinates.
double by_definition(Polytope polytope, const std::vector<double>& z, int64_t label, const int64_t* code,
                     bool normalize, double scale, double smoothing, std::vector<double>* gradient) {
  const int64_t d = int64_t(z.size());
  const Simplex simplex = Simplex::of_dimension(d);
  double sum = 0, squares = 0, loss = 0;
  for (double x : z) sum += x, squares += x * x;
  const double norm = normalize ? std::sqrt(squares) : 1;
  double factor = norm > 0 ? scale / norm : 0;
  gradient->assign(size_t(d), 0.0);
  std::vector<double> g;
  if (polytope == Polytope::kSimplex) {
    for (double x : z) g.push_back(factor * (x - simplex.m * sum) / simplex.r);
    g.push_back(factor * (simplex.a - simplex.m) * sum / simplex.r);
    loss = softmax_gradient(g, label, smoothing);
    double all = 0;
    for (double x : g) all += x;
    for (int64_t j = 0; j < d; ++j)
      (*gradient)[size_t(j)] = factor * (g[size_t(j)] + simplex.a * g[size_t(d)] - simplex.m * all) / simplex.r;
  } else if (polytope == Polytope::kOrthoplex) {
    for (double sign : {factor, -factor})
      for (double x : z) g.push_back(sign * x);
    loss = softmax_gradient(g, label, smoothing);
    for (int64_t j = 0; j < d; ++j) (*gradient)[size_t(j)] = factor * (g[size_t(j)] - g[size_t(d + j)]);
  } else {
    factor /= std::sqrt(double(d));
    double gap = 0, own = 0;
    for (int64_t j = 0; j < d; ++j) {
      const double sign = code[j / 64] >> (j % 64) & 1 ? 1 : -1, x = -2 * factor * sign * z[size_t(j)];
      gap += std::max(x, 0.0) + std::log1p(std::exp(-std::fabs(x)));
      own += factor * sign * z[size_t(j)];
      (*gradient)[size_t(j)] = factor * sign * (smoothing - 2 / (1 + std::exp(-x)));
    }
    loss = gap + smoothing * own;  // the logits of all vertices sum to zero
  }
  double dot = 0;
  for (int64_t j = 0; j < d; ++j) dot += (*gradient)[size_t(j)] * z[size_t(j)];
  if (normalize && squares > 0)
    for (int64_t j = 0; j < d; ++j) (*gradient)[size_t(j)] -= z[size_t(j)] * dot / squares;
  return loss;
}

template <typename T>
void check_cross_entropy(Polytope polytope, int64_t rows, int64_t d, bool normalize, double smoothing,
                         bool non_temporal, Random& random) {
  using A = accumulate_t<T>;
  const int64_t stride = d + 3;
  std::normal_distribution<float> normal;
  const size_t numbers = size_t((rows - 1) * stride + d);
  const std::unique_ptr<T[]> z(new T[numbers]);
  const size_t last = size_t((rows - 1) * stride);  // this row's unshifted exponentials overflow
  for (size_t i = 0; i < numbers; ++i) z[i] = to<T>((i < last ? 2 : 16) * normal(random));
  const int64_t slots = polytope == Polytope::kSimplex ? d + 1 : polytope == Polytope::kOrthoplex ? 2 * d : 7;
  const int64_t words = (d + 63) / 64;
  const std::unique_ptr<int64_t[]> codes(new int64_t[size_t(7 * words)]);
  for (int64_t i = 0; i < 7 * words; ++i) codes[size_t(i)] = int64_t(uint64_t(random()) << 32 | random());
  std::vector<int64_t> target;
  for (int64_t b = 0; b < rows; ++b) target.push_back(b == 0 ? slots - 1 : int64_t(random() % uint64_t(slots)));
  if (rows > 2) target[1] = -100;
  const double scale = 4;
  // rows_per_call: the last call may have fewer
  const auto run = [&](int64_t threads, int64_t rows_per_call, std::vector<A>* loss, std::unique_ptr<T[]>* gradient) {
    loss->assign(size_t(rows), A(-1));
    gradient->reset(new T[size_t(rows * d)]);
    const CrossEntropyArgs<T> args{z.get(),
                                   stride,
                                   target.data(),
                                   nullptr,
                                   loss->data(),
                                   gradient->get(),
                                   d,
                                   -100,
                                   non_temporal,
                                   A(1),
                                   {normalize, A(scale), Margin::kNone, A(0), A(smoothing), A(slots)}};
    const CubeCrossEntropyArgs<T> of_cube{args, codes.get(), words};
    parallel((rows + rows_per_call - 1) / rows_per_call, threads, [&](int64_t call) {
      const int64_t begin = call * rows_per_call, end = std::min(rows, begin + rows_per_call);
      if (polytope == Polytope::kSimplex) kernels<T>().simplex_cross_entropy(args, begin, end);
      if (polytope == Polytope::kOrthoplex) kernels<T>().orthoplex_cross_entropy(args, begin, end);
      if (polytope == Polytope::kCube) kernels<T>().cube_cross_entropy(of_cube, begin, end);
    });
  };
  std::vector<A> loss, again_loss;
  std::unique_ptr<T[]> gradient, again;
  run(1, rows, &loss, &gradient);
  run(3, 1, &again_loss, &again);
  check(loss == again_loss && !std::memcmp(gradient.get(), again.get(), size_t(rows * d) * sizeof(T)),
        "%s d=%lld %zu bytes: other rows or threads change the bits", kNames[int(polytope)], (long long)d, sizeof(T));
  for (int64_t b = 0; b < rows; ++b) {
    if (target[size_t(b)] == -100) {
      check(loss[size_t(b)] == 0 && value_of(gradient[size_t(b * d)]) == 0, "an ignored row counts");
      continue;
    }
    std::vector<double> row, truth;
    for (int64_t j = 0; j < d; ++j) row.push_back(double(value_of(z[size_t(b * stride + j)])));
    const double expected = by_definition(polytope, row, target[size_t(b)], codes.get() + target[size_t(b)] * words,
                                          normalize, scale, smoothing, &truth);
    const double unit = std::max(kUnit<A>, kUnit<float> * (sizeof(A) == 4));
    const bool coarse =
        polytope == Polytope::kSimplex && std::is_same_v<T, BFloat16> && std::string(isa()).starts_with("avx512");
    const double exponentials = coarse ? 8e-5 : 0;  // error of the exponentials
    check(std::fabs(double(loss[size_t(b)]) - expected) <= 64 * unit * (1 + std::fabs(expected)) + exponentials,
          "%s d=%lld %zu bytes normalize=%d smoothing=%g: loss %.9g, expected %.9g", kNames[int(polytope)],
          (long long)d, sizeof(T), normalize, smoothing, double(loss[size_t(b)]), expected);
    double worst = 0, size = 0;
    for (int64_t j = 0; j < d; ++j) {
      worst = std::max(worst, std::fabs(double(value_of(gradient[size_t(b * d + j)])) - truth[size_t(j)]));
      size = std::max(size, std::fabs(truth[size_t(j)]));
    }
    check(worst <= 256 * unit * scale + kUnit<T> * size,
          "%s d=%lld %zu bytes normalize=%d: gradient off by %.3g of %.3g", kNames[int(polytope)], (long long)d,
          sizeof(T), normalize, worst, size);
  }
}

template <typename A>
void check_contrast(int64_t rows, int64_t n, Negatives negatives, Random& random) {
  std::normal_distribution<double> normal;
  const std::unique_ptr<A[]> block(new A[size_t(rows * n)]);
  std::vector<double> dot;
  for (int64_t i = 0; i < rows * n; ++i) dot.push_back(double(block[size_t(i)] = A(normal(random))));
  std::vector<ClassIndex<A>> anchor, candidate;
  std::vector<A> anchor_scale, candidate_scale, upstream, loss(size_t(rows), A(-1));
  for (int64_t j = 0; j < n; ++j) {
    candidate.push_back(ClassIndex<A>(random() % 5));
    candidate_scale.push_back(A(0.5 + double(random() % 8) / 8));
  }
  for (int64_t i = 0; i < rows; ++i) {
    anchor.push_back(candidate[size_t(i + n - rows)]);
    anchor_scale.push_back(A(0.25));
    upstream.push_back(A(1 + i % 3));
  }
  const double mu = 10;
  const ContrastArgs<A> args{
      block.get(), n,         anchor.data(), candidate.data(), anchor_scale.data(), candidate_scale.data(),
      A(mu),       negatives, n - rows,      loss.data(),      upstream.data()};
  parallel(rows, 2, [&](int64_t row) { kernels<A>().contrast_rows(args, row, row + 1); });
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t own = i + n - rows;
    std::vector<double> s;
    double inside = 0, others = 0, same = 0;
    for (int64_t j = 0; j < n; ++j) {
      s.push_back(mu * dot[size_t(i * n + j)] * double(anchor_scale[size_t(i)]) * double(candidate_scale[size_t(j)]));
      (candidate[size_t(j)] == anchor[size_t(i)] ? same : others) +=
          candidate[size_t(j)] == anchor[size_t(i)] ? 1 : std::exp(s.back());
    }
    inside = others + (negatives == Negatives::kZeroMask  ? same
                       : negatives == Negatives::kInfoNce ? std::exp(s[size_t(own)])
                                                          : 0);
    const double expected = (inside > 0 ? std::log(inside) : 0) - s[size_t(own)];
    check(std::fabs(double(loss[size_t(i)]) - expected) <= 2e-5 * (1 + std::fabs(expected)),
          "contrast n=%lld: loss %.9g, expected %.9g", (long long)n, double(loss[size_t(i)]), expected);
    for (int64_t j = 0; j < n; ++j) {
      double p = candidate[size_t(j)] == anchor[size_t(i)] ? 0 : std::exp(s[size_t(j)]) / inside;
      if (j == own) p = (negatives == Negatives::kInfoNce ? std::exp(s[size_t(own)]) / inside : 0) - 1;
      const double g =
          p * double(upstream[size_t(i)]) * mu * double(anchor_scale[size_t(i)]) * double(candidate_scale[size_t(j)]);
      check(std::fabs(double(block[size_t(i * n + j)]) - g) <= 2e-5 * (1 + std::fabs(g)),
            "contrast n=%lld: derivative %.9g, expected %.9g", (long long)n, double(block[size_t(i * n + j)]), g);
    }
  }
}

// A product of rows with rows (features with features) and one of columns with columns (sums with features), written
// and added. Some elements are compared with sums in double. Several threads must give the same bits.
template <typename T>
void check_product(int64_t m, int64_t n, int64_t k, Random& random) {
  using A = accumulate_t<T>;
  std::normal_distribution<float> normal;
  const int64_t wide = k + 3, stride = n + 2;
  const auto fill = [&](auto* at, int64_t numbers) {
    for (int64_t i = 0; i < numbers; ++i) at[i] = to<std::decay_t<decltype(*at)>>(normal(random));
  };
  const auto last = [](int64_t lines, int64_t apart, int64_t length) { return (lines - 1) * apart + length; };
  const std::unique_ptr<T[]> rows(new T[size_t(last(m, wide, k))]), other_rows(new T[size_t(last(n, wide, k))]),
      columns(new T[size_t(last(k, stride, n))]);
  const std::unique_ptr<A[]> sums(new A[size_t(last(k, m, m))]);
  fill(rows.get(), last(m, wide, k)), fill(other_rows.get(), last(n, wide, k));
  fill(columns.get(), last(k, stride, n)), fill(sums.get(), last(k, m, m));

  const auto compare = [&](auto left, auto right, const char* name) {
    std::vector<A> out[2];
    for (int64_t threads : {1, 3}) {
      std::vector<A>& c = out[threads > 1];
      c.assign(size_t(last(m, stride, n)), A(-7));
      MatrixProduct<A> product;
      for (const bool add : {false, true})
        product(m, n, k, left, right, c.data(), stride, add, [&](int64_t count, int64_t, const auto& work) {
          parallel(count, threads, [&](int64_t item) { work(item, item + 1); });
        });
    }
    check(out[0] == out[1], "%s product %lld x %lld x %lld: threads change the bits", name, (long long)m, (long long)n,
          (long long)k);
    const int64_t some = std::max<int64_t>(1, m * n / 3000);
    for (int64_t at = 0; at < m * n; at += 1 + int64_t(random() % uint64_t(some * 2 - 1))) {
      const int64_t i = at / n, j = at % n;
      double truth = 0, size = 0;
      for (int64_t l = 0; l < k; ++l) {
        const double x = 2 * double(value_of(*left.from(i, l).first)) * double(value_of(*right.from(j, l).first));
        truth += x, size += std::fabs(x);
      }
      const double got = double(out[0][size_t(i * stride + j)]);
      check(std::fabs(got - truth) <= kUnit<A> * std::sqrt(double(k) + 8) * size,
            "%s product %lld x %lld x %lld, %zu bytes: [%lld, %lld] = %.9g, expected %.9g", name, (long long)m,
            (long long)n, (long long)k, sizeof(T), (long long)i, (long long)j, got, truth);
    }
    for (int64_t i = 0; i + 1 < m; ++i)
      for (int64_t j = n; j < stride; ++j)
        check(out[0][size_t(i * stride + j)] == A(-7), "%s product: written between its rows", name);
  };
  compare(PanelView<T>{rows.get(), wide, 1}, PanelView<T>{other_rows.get(), wide, 1}, "rows' ");
  compare(PanelView<A>{sums.get(), 1, m}, PanelView<T>{columns.get(), 1, stride}, "columns'");
}

// Per-row scalar exp: an error of at most two units in the last place, and 0 where the result would be denormal.
template <typename A>
void check_exponential() {
  const double least = std::log(double(std::numeric_limits<A>::min()));
  for (int i = 0; i < 20000; ++i) {
    const A x = A(least * i / 20000);
    const long double truth = std::exp(static_cast<long double>(x));
    check(std::fabs(scalar_exp(x) / truth - 1) <= 2 * kUnit<A>, "exp(%.9g) = %.9g, expected %.9g", double(x),
          double(scalar_exp(x)), double(truth));
  }
  for (const A x : {A(least - 1), A(-1e30), -std::numeric_limits<A>::infinity()})
    check(scalar_exp(x) == A(0), "exp(%g) is not 0", double(x));
  check(scalar_exp(A(0)) == A(1), "exp(0) is not 1");
  check(std::isnan(scalar_exp(std::numeric_limits<A>::quiet_NaN())), "exp(nan) is a number");
}

template <typename T>
void check_format(const Options& options, Random& random) {
  for (int64_t d : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 130, 2047, 2048, 2049, 4100}) {
    if (options.small && d != 17 && d != 2049) continue;
    for (const Polytope polytope : {Polytope::kSimplex, Polytope::kOrthoplex, Polytope::kCube})
      for (int turn = 0; turn < 4; ++turn)
        check_cross_entropy<T>(polytope, d == 17 ? 37 : 5, d, turn % 2, turn == 2 ? 0.1 : 0.0, turn > 1, random);
  }
  for (const auto [m, n, k] : {std::array<int64_t, 3>{1, 1, 1}, {5, 3, 7}, {12, 32, 16}, {37, 65, 33}, {100, 40, 1100}})
    check_product<T>(m, n, k, random);
}
}  // namespace

void test_losses(const Options& options) {
  Random random(7);
  check_exponential<float>();
  check_exponential<double>();
  check_format<float>(options, random);
  check_format<double>(options, random);
  check_format<BFloat16>(options, random);
  check_format<Half>(options, random);
  for (const Negatives negatives : {Negatives::kZeroMask, Negatives::kRemove, Negatives::kInfoNce})
    for (int64_t n : {1, 3, 16, 17, 70, 300}) {
      check_contrast<float>(std::min<int64_t>(n, 9), n, negatives, random);
      check_contrast<double>(std::min<int64_t>(n, 9), n, negatives, random);
    }
  if (!options.small) check_product<float>(700, 660, 1030, random);  // several chunks on both sides
}
