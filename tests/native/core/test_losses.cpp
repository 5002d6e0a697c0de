// The losses' kernels against the definitions in double: every number format, tails, tiles, stores past the
// caches, and the same bits from several threads.  Buffers end exactly where the kernels must stop.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>

#include "../../../csrc/cpu/parallel.h"
#include "core.h"

using namespace simplexfix;
using namespace simplexfix::cpu;

namespace {

// Numbers of the formats, through the bits of a float (16-bit ones hold few digits: the inputs are chosen so).
float value_of(float x) { return x; }
double value_of(double x) { return x; }
float value_of(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
float value_of(Half x) { return float(*reinterpret_cast<const _Float16*>(&x.bits)); }
template <typename T>
T to(float x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t(bits >> 16)};
  } else if constexpr (std::is_same_v<T, Half>) {
    const auto h = static_cast<_Float16>(x);
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

// Loss and gradient of one row from the vertices themselves.
double by_definition(const std::vector<double>& z, int64_t label, bool normalize, double scale, double smoothing,
                     std::vector<double>* gradient) {
  const int64_t d = int64_t(z.size());
  const Simplex simplex = Simplex::of_dimension(d);
  double sum = 0, squares = 0;
  for (double x : z) sum += x, squares += x * x;
  const double norm = normalize ? std::sqrt(squares) : 1, factor = norm > 0 ? scale / norm : 0;
  std::vector<double> logits(size_t(d + 1));
  for (int64_t c = 0; c < d; ++c) logits[size_t(c)] = factor * (z[size_t(c)] - simplex.m * sum) / simplex.r;
  logits[size_t(d)] = factor * (simplex.a - simplex.m) * sum / simplex.r;
  const double largest = *std::max_element(logits.begin(), logits.end());
  double total = 0, mean = 0;
  for (double l : logits) total += std::exp(l - largest), mean += l / double(d + 1);
  const double logsumexp = largest + std::log(total);
  std::vector<double> g(size_t(d + 1));
  double g_sum = 0;
  for (int64_t c = 0; c <= d; ++c) {
    g[size_t(c)] = std::exp(logits[size_t(c)] - logsumexp) - smoothing / double(d + 1) - (c == label) * (1 - smoothing);
    if (c < d) g_sum += g[size_t(c)];
  }
  double along = 0;
  gradient->resize(size_t(d));
  for (int64_t j = 0; j < d; ++j) {
    const double last = simplex.a * g[size_t(d)] - simplex.m * (g_sum + g[size_t(d)]);
    (*gradient)[size_t(j)] = factor * (g[size_t(j)] + last) / simplex.r;
    along += (*gradient)[size_t(j)] * z[size_t(j)];
  }
  if (normalize && squares > 0)
    for (int64_t j = 0; j < d; ++j) (*gradient)[size_t(j)] -= z[size_t(j)] * along / squares;
  return (1 - smoothing) * (logsumexp - logits[size_t(label)]) + smoothing * (logsumexp - mean);
}

template <typename T>
void check_cross_entropy(int64_t rows, int64_t d, bool normalize, double smoothing, bool streams, Random& random) {
  using A = accumulate_t<T>;
  const int64_t stride = d + 3;
  std::normal_distribution<float> normal;
  const size_t numbers = size_t((rows - 1) * stride + d);
  const std::unique_ptr<T[]> z(new T[numbers]);
  for (size_t i = 0; i < numbers; ++i) z[i] = to<T>(2 * normal(random));
  std::vector<int64_t> target;
  for (int64_t b = 0; b < rows; ++b) target.push_back(b == 0 ? d : int64_t(random() % uint64_t(d + 1)));
  if (rows > 2) target[1] = -100;
  const double scale = 4;
  const auto run = [&](int64_t threads, std::vector<A>* loss, std::unique_ptr<T[]>* gradient) {
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
                                   streams,
                                   A(1),
                                   Simplex::of_dimension(d),
                                   {normalize, A(scale), Margin::kNone, A(0), A(smoothing), A(d + 1)}};
    parallel(rows, threads, [&](int64_t row) { kernels<T>().simplex_cross_entropy(args, row, row + 1); });
  };
  std::vector<A> loss, again_loss;
  std::unique_ptr<T[]> gradient, again;
  run(1, &loss, &gradient);
  run(3, &again_loss, &again);
  check(loss == again_loss && !std::memcmp(gradient.get(), again.get(), size_t(rows * d) * sizeof(T)),
        "d=%lld %zu bytes: threads change the bits", (long long)d, sizeof(T));
  for (int64_t b = 0; b < rows; ++b) {
    if (target[size_t(b)] == -100) {
      check(loss[size_t(b)] == 0 && value_of(gradient[size_t(b * d)]) == 0, "an ignored row counts");
      continue;
    }
    std::vector<double> row, truth;
    for (int64_t j = 0; j < d; ++j) row.push_back(double(value_of(z[size_t(b * stride + j)])));
    const double expected = by_definition(row, target[size_t(b)], normalize, scale, smoothing, &truth);
    const double unit = std::max(kUnit<A>, kUnit<float> * (sizeof(A) == 4));
    check(std::fabs(double(loss[size_t(b)]) - expected) <= 64 * unit * (1 + std::fabs(expected)),
          "d=%lld %zu bytes normalize=%d smoothing=%g: loss %.9g, expected %.9g", (long long)d, sizeof(T), normalize,
          smoothing, double(loss[size_t(b)]), expected);
    double worst = 0, size = 0;
    for (int64_t j = 0; j < d; ++j) {
      worst = std::max(worst, std::fabs(double(value_of(gradient[size_t(b * d + j)])) - truth[size_t(j)]));
      size = std::max(size, std::fabs(truth[size_t(j)]));
    }
    check(worst <= 64 * unit * scale + kUnit<T> * size, "d=%lld %zu bytes normalize=%d: gradient off by %.3g of %.3g",
          (long long)d, sizeof(T), normalize, worst, size);
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

template <typename T>
void check_format(const Options& options, Random& random) {
  for (int64_t d : {1, 2, 7, 8, 15, 16, 17, 63, 64, 65, 130, 2047, 2048, 2049, 4100}) {
    if (options.small && d != 17 && d != 2049) continue;
    for (int turn = 0; turn < 4; ++turn)
      check_cross_entropy<T>(5, d, turn % 2, turn == 2 ? 0.1 : 0.0, turn > 1, random);
  }
}
}  // namespace

void test_losses(const Options& options) {
  Random random(7);
  check_format<float>(options, random);
  check_format<double>(options, random);
  check_format<BFloat16>(options, random);
  check_format<Half>(options, random);
  for (const Negatives negatives : {Negatives::kZeroMask, Negatives::kRemove, Negatives::kInfoNce})
    for (int64_t n : {1, 3, 16, 17, 70, 300}) {
      check_contrast<float>(std::min<int64_t>(n, 9), n, negatives, random);
      check_contrast<double>(std::min<int64_t>(n, 9), n, negatives, random);
    }
}
