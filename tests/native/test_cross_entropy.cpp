// Tests csrc/cuda/cross_entropy for all polytopes against the long double reference.
#include <algorithm>
#include <limits>

#include "../../csrc/cuda/kernels.h"
#include "check.h"
#include "reference.h"
#include "tests.h"

namespace {
using simplexfix::accumulate_t;
using simplexfix::Margin;
using simplexfix::Reduction;

// The polytopes, with their kernels and reference implementations.
using simplexfix::cuda::CrossEntropyArgs;
struct SimplexCase {
  static constexpr const char* kName = "simplex";
  template <typename R>
  using Reference = reference::Simplex<R>;
  static int64_t slots(int64_t d) { return d + 1; }
  static const char* launch(const CrossEntropyArgs& args) { return simplexfix::cuda::simplex_cross_entropy(args); }
};
struct OrthoplexCase {
  static constexpr const char* kName = "orthoplex";
  template <typename R>
  using Reference = reference::Orthoplex<R>;
  static int64_t slots(int64_t d) { return 2 * d; }
  static const char* launch(const CrossEntropyArgs& args) { return simplexfix::cuda::orthoplex_cross_entropy(args); }
};
struct CubeCase {  // all vertices; a target is its own code
  static constexpr const char* kName = "cube";
  template <typename R>
  using Reference = reference::Cube<R>;
  static int64_t slots(int64_t d) { return int64_t(1) << d; }
  static const char* launch(const CrossEntropyArgs& args) {
    return simplexfix::cuda::cube_cross_entropy(args, nullptr);
  }
};

struct Config {
  const char* name;
  reference::Options options;
  bool weighted;
  Reduction reduction;
  bool gradient;
  bool divides_later = false;  // the gradient of a mean is that of the sum
};
using reference::MarginKind;
const Config kConfigs[] = {
    {"plain", {}, false, Reduction::kMean, true},
    {"smoothing", {false, 1, MarginKind::kNone, 0, 0.1}, false, Reduction::kNone, true},
    {"weights", {false, 2.5, MarginKind::kNone, 0, 0}, true, Reduction::kSum, true},
    {"weights+smoothing", {false, 1, MarginKind::kNone, 0, 0.2}, true, Reduction::kMean, true},
    {"normalize, divides later", {true, 16, MarginKind::kNone, 0, 0}, false, Reduction::kMean, true, true},
    {"cosine margin", {true, 30, MarginKind::kCosine, 0.35, 0.1}, false, Reduction::kNone, true},
    {"angular margin+weights", {true, 10, MarginKind::kAngular, 0.5, 0.1}, true, Reduction::kSum, true},
    {"loss alone", {true, 4, MarginKind::kNone, 0, 1.0}, true, Reduction::kNone, false},
};
// all_of() counts through configurations and shapes. Every third count has spoiled rows, and every fifth one has an
// ignore_index that is a slot.
static_assert(std::size(kConfigs) % 3 != 0 && std::size(kConfigs) % 5 != 0, "a configuration would miss some shapes");

struct Shape {
  int64_t rows, d, stride;  // stride >= d
  int offset;               // elements by which z and the gradient start past a 16-byte boundary
  int64_t shift;            // row b holds example b + shift
  int64_t ignore = -100;    // ignore_index: a value that is not a slot, or one of the slots
};

// The inputs and the results of one call.
template <typename T>
struct Call {
  using A = accumulate_t<T>;
  Shape shape;
  int64_t slots;
  Buffer<T> z, gradient;
  Buffer<int64_t> target;
  Buffer<A> weight, row_loss, loss, divisor;
  Buffer<double> workspace;

  Call(const Shape& s, int64_t slots)
      : shape(s),
        slots(slots),
        z(s.rows ? (s.rows - 1) * s.stride + s.d : 0, s.offset),
        gradient(s.rows * s.d, s.offset % 4),
        target(s.rows, 0),
        weight(slots, 0),
        row_loss(s.rows, 0),
        loss(1, 0),
        divisor(1, 0),
        workspace(simplexfix::cuda::cross_entropy_workspace(s.rows, s.d, dtype_of<T>()), 0) {}

  const T* row(int64_t b) { return z.data() + b * shape.stride; }
};

// Makes example number e, which is the same wherever it is placed. `spoiled` adds kinds of rows whose result is nan.
template <typename T>
void make_example(int64_t e, int64_t d, int64_t slots, int64_t ignore, bool spoiled, T* z, int64_t* target) {
  std::mt19937 random(unsigned(e) * 7919u + unsigned(d));
  std::normal_distribution<float> normal;
  const int kind = int(e % (spoiled ? 12 : 8));
  *target = int64_t(random() % uint64_t(slots));
  for (int64_t j = 0; j < d; ++j) z[j] = T(normal(random) * (kind == 1 ? 3.f : 1.f));
  const int64_t other = int64_t(random() % uint64_t(d));
  if (kind == 2) *target = slots - 1;
  if (kind == 3) *target = ignore;
  if (kind == 4 && *target < d) z[*target] = T(14.f);  // correct and confident
  if (kind == 5) std::fill(z, z + d, T(0.f));
  if (kind == 6) {  // confident and mostly wrong
    std::fill(z, z + d, T(0.f));
    z[other] = T(9.f);
  }
  if (kind == 7)  // heavy tails
    for (int64_t j = 0; j < d; ++j)
      z[j] = T(std::fmin(40.f, std::fmax(-40.f, normal(random) * std::exp(1.5f * normal(random)))));
  if (kind == 8) *target = -1;
  if (kind == 9) *target = slots;
  if (kind == 10) *target = random() % 2 ? std::numeric_limits<int64_t>::max() : std::numeric_limits<int64_t>::min();
  if (kind == 11) z[other] = T(NAN);
}

template <typename P, typename T>
void run(const Config& config, bool spoiled, Call<T>* call) {
  using A = accumulate_t<T>;
  const Shape& s = call->shape;
  for (int64_t b = 0; b < s.rows; ++b)
    make_example(b + s.shift, s.d, call->slots, s.ignore, spoiled, call->z.data() + b * s.stride, &call->target[b]);
  std::mt19937 random(unsigned(s.d));
  for (int64_t c = 0; c < call->slots; ++c) call->weight[c] = A(0.25f + float(random() % 1024) / 512);
  const reference::Options& o = config.options;
  const char* error =
      P::launch({call->z.data(),
                 s.stride,
                 call->target.data(),
                 config.weighted ? call->weight.data() : nullptr,
                 call->row_loss.data(),
                 config.reduction == Reduction::kNone ? call->row_loss.data() : call->loss.data(),
                 config.gradient ? call->gradient.data() : nullptr,
                 config.divides_later ? call->divisor.data() : nullptr,
                 call->workspace.data(),
                 s.rows,
                 s.d,
                 call->slots,
                 s.ignore,
                 {o.normalize, o.scale, static_cast<Margin>(o.margin), o.margin_size, o.smoothing, double(call->slots)},
                 config.reduction,
                 dtype_of<T>(),
                 nullptr});
  if (error) failed("launch: %s", error);
}

template <typename P, typename T>
void check(const Config& config, const Shape& s, bool spoiled) {
  using A = accumulate_t<T>;
  ++g_cases;
  const int64_t slots = P::slots(s.d);
  Call<T> call(s, slots);
  run<P>(config, spoiled, &call);

  char name[200];
  std::snprintf(name, sizeof name, "%s<%s> %s, %lld x %lld, stride %lld, offset %d%s", P::kName, Format<T>::kName,
                config.name, (long long)s.rows, (long long)s.d, (long long)s.stride, s.offset,
                spoiled ? ", with bad rows" : "");
  const typename P::template Reference<long double> polytope(s.d);
  const typename P::template Reference<A> polytope_naive(s.d);
  const auto weight = config.weighted ? widened<long double>(call.weight.data(), slots) : std::vector<long double>();
  const auto weight_naive = config.weighted ? widened<A>(call.weight.data(), slots) : std::vector<A>();

  double counted = 0;
  bool any_bad = false;
  for (int64_t b = 0; b < s.rows; ++b) {
    const int64_t y = call.target[b];
    if (y != s.ignore && y >= 0 && y < slots) counted += config.weighted ? double(weight[size_t(y)]) : 1.0;
  }
  const bool mean = config.reduction == Reduction::kMean;
  if (mean && !(std::fabs(call.workspace[0] - counted) <= 1e-12 * counted))
    failed("%s: counted weight %.17g, truth %.17g", name, call.workspace[0], counted);
  if (config.divides_later && call.divisor[0] != A(call.workspace[0]))
    failed("%s: divisor %.9g, counted weight %.17g", name, double(call.divisor[0]), call.workspace[0]);

  long double sum = 0;
  double sum_allowed = 0;
  for (int64_t b = 0; b < s.rows; ++b) {
    const int64_t y = call.target[b];
    const double ours = value_of(call.row_loss[b]);
    T* g = call.gradient.data() + b * s.d;
    const auto z = widened<long double>(call.row(b), s.d);
    const bool bad =
        y != s.ignore && (y < 0 || y >= slots || std::any_of(z.begin(), z.end(), [](auto v) { return v != v; }));
    any_bad |= bad;
    if (bad || y == s.ignore) {
      if (bad ? !std::isnan(ours) : ours != 0)
        failed("%s: row %lld, target %lld: loss %g", name, (long long)b, (long long)y, ours);
      for (int64_t j = 0; config.gradient && j < s.d; ++j)
        if (bad ? !std::isnan(value_of(g[j])) : value_of(g[j]) != 0)
          failed("%s: row %lld, target %lld: gradient[%lld] = %g", name, (long long)b, (long long)y, (long long)j,
                 value_of(g[j]));
      continue;
    }
    auto truth = reference::cross_entropy(polytope, config.options, z, y, weight);
    auto naive =
        reference::cross_entropy(polytope_naive, config.options, widened<A>(call.row(b), s.d), y, weight_naive);
    const double sine = double(truth.sine), logit = 1 + double(truth.largest_logit);
    const double allowed = 2 * std::fabs(double(naive.loss - truth.loss)) + floor_of<A>(2 * logit / sine);
    if (!(std::fabs(ours - double(truth.loss)) <= allowed))
      failed("%s: row %lld, target %lld: loss %.9g, naive %.9g, truth %.9Lg, allowed error %g", name, (long long)b,
             (long long)y, ours, double(naive.loss), truth.loss, allowed);
    sum += truth.loss;
    sum_allowed += allowed;
    if (!config.gradient) continue;
    const long double upstream = mean && !config.divides_later ? 1.0L / counted : 1.0L;
    for (auto& v : truth.gradient) v *= upstream;
    for (auto& v : naive.gradient) v *= A(upstream);
    const double slack = 2 * largest_difference(naive.gradient, truth.gradient) +
                         floor_of<A>(double(truth.plain_gradient * upstream) * logit / (sine * sine * sine));
    for (int64_t j = 0; j < s.d; ++j) {
      const double want = double(truth.gradient[size_t(j)]);
      if (!(std::fabs(value_of(g[j]) - want) <= slack + rounding_of<T>(want)))
        failed("%s: row %lld, target %lld: gradient[%lld] = %.9g, naive %.9g, truth %.9g, allowed error %g", name,
               (long long)b, (long long)y, (long long)j, value_of(g[j]), double(naive.gradient[size_t(j)]), want,
               slack + rounding_of<T>(want));
    }
  }
  if (config.reduction != Reduction::kNone) {
    const double ours = value_of(call.loss[0]);
    const double want = double(mean ? sum / (long double)counted : sum);  // the mean over no rows is nan, as in torch
    const double allowed = (mean ? sum_allowed / counted : sum_allowed) + rounding_of<A>(want);
    if (any_bad || (mean && counted == 0) ? !std::isnan(ours) : !(std::fabs(ours - want) <= allowed))
      failed("%s: loss %.9g, truth %.9g, allowed error %g", name, ours, want, allowed);
  }
  if (!call.gradient.surroundings_untouched() || !call.row_loss.surroundings_untouched() ||
      !call.loss.surroundings_untouched() || !call.divisor.surroundings_untouched() ||
      !call.workspace.surroundings_untouched())
    failed("%s: wrote outside its results", name);
}

// The same examples must give the same bits at other places, with another stride and alignment.
template <typename P, typename T>
void check_place(const Config& config, int64_t d) {
  ++g_cases;
  const int64_t rows = 11;
  Call<T> one({rows, d, d, 0, 0, -100}, P::slots(d)), other({rows - 3, d, d + 3, 1, 3, -100}, P::slots(d));
  run<P>(config, false, &one);
  run<P>(config, false, &other);
  for (int64_t b = 0; b < rows - 3; ++b)
    if (std::memcmp(&one.row_loss[b + 3], &other.row_loss[b], sizeof one.row_loss[0]) ||
        std::memcmp(&one.gradient[(b + 3) * d], &other.gradient[b * d], size_t(d) * sizeof(T)))
      failed("%s<%s> %s, d %lld: example %lld changes with its place", P::kName, Format<T>::kName, config.name,
             (long long)d, (long long)b + 3);
}

// A cube with too many vertices to enumerate: codes define its classes.
template <typename T>
void check_coded_cube(int64_t rows, int64_t d, bool normalize, int offset) {
  using A = accumulate_t<T>;
  ++g_cases;
  const int64_t slots = 37, words = (d + 63) / 64;
  const reference::Options options{normalize, normalize ? 9.0 : 1.5};
  Call<T> call({rows, d, d + 1, offset, 0}, slots);
  Buffer<int64_t> codes(slots * words, 0);
  std::mt19937_64 random{uint64_t(d)};
  std::normal_distribution<float> normal(0, 2);
  for (int64_t i = 0; i < codes.size(); ++i) codes[i] = int64_t(random());
  for (int64_t c = 0; c < slots; ++c) call.weight[c] = A(0.5f + float(c) / 32);
  for (int64_t b = 0; b < rows; ++b) {
    call.target[b] = int64_t(random() % uint64_t(slots));
    for (int64_t j = 0; j < d; ++j) call.z[b * (d + 1) + j] = T(normal(random));
  }
  const char* error =
      simplexfix::cuda::cube_cross_entropy({call.z.data(),
                                            d + 1,
                                            call.target.data(),
                                            call.weight.data(),
                                            call.row_loss.data(),
                                            call.row_loss.data(),
                                            call.gradient.data(),
                                            nullptr,
                                            call.workspace.data(),
                                            rows,
                                            d,
                                            slots,
                                            -100,
                                            {options.normalize, options.scale, Margin::kNone, 0, 0, double(slots)},
                                            Reduction::kNone,
                                            dtype_of<T>(),
                                            nullptr},
                                           codes.data());
  if (error) failed("launch: %s", error);
  for (int64_t b = 0; b < rows; ++b) {
    const int64_t y = call.target[b];
    std::vector<bool> positive;
    for (int64_t j = 0; j < d; ++j) positive.push_back(uint64_t(codes[y * words + j / 64]) >> (j % 64) & 1);
    const auto truth =
        reference::coded_cube(options, widened<long double>(call.row(b), d), positive, (long double)(call.weight[y]));
    const auto naive = reference::coded_cube(options, widened<A>(call.row(b), d), positive, call.weight[y]);
    const double logit = 1 + double(truth.largest_logit), ours = value_of(call.row_loss[b]);
    const double allowed = 2 * std::fabs(double(naive.loss - truth.loss)) + floor_of<A>(logit + double(truth.loss));
    if (!(std::fabs(ours - double(truth.loss)) <= allowed))
      failed("coded cube<%s>, d %lld, row %lld: loss %.9g, truth %.9Lg, allowed error %g", Format<T>::kName,
             (long long)d, (long long)b, ours, truth.loss, allowed);
    const double slack =
        2 * largest_difference(naive.gradient, truth.gradient) + 4 * floor_of<A>(double(truth.plain_gradient));
    for (int64_t j = 0; j < d; ++j) {
      const double want = double(truth.gradient[size_t(j)]), got = value_of(call.gradient[b * d + j]);
      if (!(std::fabs(got - want) <= slack + rounding_of<T>(want)))
        failed("coded cube<%s>, d %lld, row %lld: gradient[%lld] = %.9g, truth %.9g, allowed error %g",
               Format<T>::kName, (long long)d, (long long)b, (long long)j, got, want, slack + rounding_of<T>(want));
    }
  }
  if (!call.gradient.surroundings_untouched() || !call.row_loss.surroundings_untouched() ||
      !call.workspace.surroundings_untouched())
    failed("coded cube: wrote outside its results");
}

// Lengths for every regime: a team's head and tail; a warp; both sides of the switch to blocks; rows staged by a short
// and by a long block; two and more chunks.
template <typename T>
std::vector<int64_t> lengths(bool small) {
  const int64_t chunked = sizeof(T) == 2 ? 23000 : sizeof(T) == 4 ? 12000 : 8200;
  if (small) return {9, 257, 4097, chunked};
  return {1, 2, 7, 8, 9, 31, 33, 130, 256, 257, 1023, 1024, 4097, chunked};
}

template <typename P, typename T>
void all_of(bool small) {
  int turn = 0;
  for (int64_t d : lengths<T>(small)) {
    if (std::is_same_v<P, CubeCase> && d > 9) continue;
    for (const Config& config : kConfigs) {
      ++turn;
      if (std::is_same_v<P, CubeCase> && config.weighted && config.options.smoothing > 0) continue;
      if (d > 1024 && turn % 2) continue;
      if (small && turn % (d > 1024 ? 5 : 3)) continue;
      // 37, and 5 beyond 256 columns, are more rows than 3 blocks take at a time (SIMPLEXFIX_MAX_BLOCKS in harness.py).
      const int64_t rows = d > 256 ? (small ? 2 : 5) : turn % 4 == 0 ? 1 : 37;
      const int64_t stride = d + int64_t(turn % 3) * (turn % 2 ? 1 : 3);
      check<P, T>(config, {rows, d, stride, turn % 4, turn % 8, turn % 5 ? -100 : d / 2}, turn % 3 == 0);
    }
  }
  for (const Config& config : kConfigs)
    if (!std::is_same_v<P, CubeCase> || !(config.weighted && config.options.smoothing > 0))
      check<P, T>(config, {0, 5, 5, 0, 0, -100}, false);
  check<P, T>(kConfigs[0], {1, 5, 5, 0, 3, -100}, false);  // one ignored row: a mean over no rows
  for (int64_t d : {int64_t(9), int64_t(1023), lengths<T>(small).back()}) {
    if ((small || std::is_same_v<P, CubeCase>) && d > 9) continue;
    check_place<P, T>(kConfigs[1], d);
    if (!std::is_same_v<P, CubeCase>) check_place<P, T>(kConfigs[6], d);
  }
}

template <typename T>
void polytopes_of(bool small) {
  all_of<SimplexCase, T>(small);
  all_of<OrthoplexCase, T>(small);
  all_of<CubeCase, T>(small);
  for (int64_t d : lengths<T>(small))
    for (bool normalize : {false, true})
      if (!small || normalize) check_coded_cube<T>(small ? 1 : 4, d, normalize, int(d % 4));
}
}  // namespace

void test_cross_entropy(const Selection& selection) {
  if (selection.has("float")) polytopes_of<float>(selection.small);
  if (selection.has("double")) polytopes_of<double>(selection.small);
  if (selection.has("half")) polytopes_of<__half>(selection.small);
  if (selection.has("bfloat16")) polytopes_of<__nv_bfloat16>(selection.small);
}
