// Tests csrc/cuda/contrast against its definition in long double.
#include <algorithm>

#include "../../csrc/cuda/kernels.h"
#include "check.h"
#include "reference.h"
#include "tests.h"

namespace {
using simplexfix::accumulate_t;
using simplexfix::Negatives;

// One row by the definition, with every exponential computed directly. `negatives` determines the terms of candidates
// of the anchor's class.
template <typename R>
R naive_row(Negatives negatives, const std::vector<R>& score, const std::vector<bool>& differs, int64_t own,
            std::vector<R>* derivative) {
  std::vector<R> terms(score.size(), R(0));
  R top = negatives == Negatives::kZeroMask ? R(0) : score[own];
  for (size_t j = 0; j < score.size(); ++j)
    if (differs[j]) top = std::max(top, score[j]);
  R total = R(0);
  for (size_t j = 0; j < score.size(); ++j) {
    if (differs[j] || (negatives == Negatives::kInfoNce && int64_t(j) == own)) terms[j] = std::exp(score[j] - top);
    total += differs[j] ? terms[j] : negatives == Negatives::kZeroMask ? std::exp(-top) : terms[j];
  }
  const bool nothing = total == R(0);  // remove, and no candidate differs
  for (size_t j = 0; j < score.size(); ++j)
    (*derivative)[j] = (nothing ? R(0) : terms[j] / total) - (int64_t(j) == own ? R(1) : R(0));
  return (nothing ? R(0) : std::log(total) + top) - score[own];
}

template <typename A>
void check_rows(int64_t rows, int64_t candidates, int64_t first, int classes, Negatives negatives, bool derivatives,
                double spread) {
  ++g_cases;
  const double mu = 10;
  Buffer<A> similarity(rows * candidates, int(candidates % 4)), anchor_scale(rows, 1), candidate_scale(candidates, 2),
      upstream(rows, 3), loss(rows, 0);
  Buffer<int64_t> anchor_class(rows, 0), candidate_class(candidates, 1);
  std::mt19937 random(unsigned(candidates * 7 + rows));
  std::normal_distribution<float> normal(0, 1);
  for (int64_t j = 0; j < candidates; ++j) {
    candidate_class[j] = (int64_t(1) << 40) * (int64_t(random()) % classes) - 1;
    candidate_scale[j] = A(0.5f + float(random() % 100) / 100);
  }
  for (int64_t i = 0; i < rows; ++i) {
    anchor_class[i] = candidate_class[first + i];
    anchor_scale[i] = A(0.5f + float(random() % 100) / 100);
    upstream[i] = A(normal(random));
    for (int64_t j = 0; j < candidates; ++j) similarity[i * candidates + j] = A(float(spread) * normal(random));
  }
  std::vector<A> before(similarity.data(), similarity.data() + similarity.size());
  if (const char* error = simplexfix::cuda::contrast_rows(
          {similarity.data(), anchor_class.data(), candidate_class.data(), anchor_scale.data(), candidate_scale.data(),
           derivatives ? upstream.data() : nullptr, loss.data(), rows, candidates, first, mu, negatives, dtype_of<A>(),
           nullptr}))
    failed("launch: %s", error);

  for (int64_t i = 0; i < rows; ++i) {
    std::vector<long double> score(static_cast<size_t>(candidates)), derivative(score.size());
    std::vector<A> naive_score(score.size()), naive_derivative(score.size());
    std::vector<bool> differs(score.size());
    for (int64_t j = 0; j < candidates; ++j) {
      const A s = before[size_t(i * candidates + j)];
      score[j] = (long double)(mu)*s * anchor_scale[i] * candidate_scale[j];
      naive_score[j] = s * (A(mu) * anchor_scale[i]) * candidate_scale[j];
      differs[j] = candidate_class[j] != anchor_class[i];
    }
    const long double truth = naive_row(negatives, score, differs, first + i, &derivative);
    const A naive = naive_row(negatives, naive_score, differs, first + i, &naive_derivative);
    const long double largest = reference::largest(score);
    const double slack = 2 * std::fabs(double(naive - truth)) + floor_of<A>(double(largest) + 1);
    if (!(std::fabs(double(loss[i] - truth)) <= slack))
      failed("contrast_rows<%s> %lld x %lld, negatives %d, row %lld: loss %.9g, truth %.9g, allowed error %g",
             Format<A>::kName, (long long)rows, (long long)candidates, int(negatives), (long long)i, double(loss[i]),
             double(truth), slack);
    if (!derivatives) continue;
    for (int64_t j = 0; j < candidates; ++j) {
      const long double chain = (long double)(mu)*upstream[i] * anchor_scale[i] * candidate_scale[j];
      const double want = double(derivative[j] * chain), got = double(similarity[i * candidates + j]);
      const double naive_error = std::fabs(double((naive_derivative[j] - derivative[j]) * chain));
      const double allowed = 2 * naive_error + floor_of<A>(double(std::fabs(chain)) * (1 + double(largest)));
      if (!(std::fabs(got - want) <= allowed))
        failed("contrast_rows<%s> %lld x %lld, negatives %d: [%lld, %lld] = %.9g, truth %.9g, allowed error %g",
               Format<A>::kName, (long long)rows, (long long)candidates, int(negatives), (long long)i, (long long)j,
               got, want, allowed);
    }
  }
  if (!similarity.surroundings_untouched() || !loss.surroundings_untouched())
    failed("contrast_rows: wrote outside its results");
}

template <typename T>
void check_features(int64_t rows, int64_t d, int64_t stride, int offset) {
  using A = accumulate_t<T>;
  ++g_cases;
  Buffer<T> z(rows ? (rows - 1) * stride + d : 0, offset), out(rows * d, offset % 3);
  Buffer<A> grad_unit(rows * d, 1), norm(rows, 0);
  std::mt19937 random(unsigned(d + rows));
  std::normal_distribution<float> normal(0, 2);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < d; ++j) {
      z[i * stride + j] = T(i % 5 == 3 ? 0.f : normal(random));
      grad_unit[i * d + j] = A(normal(random));
    }
  const char* error = simplexfix::cuda::inverse_norms({z.data(), stride, norm.data(), rows, d, dtype_of<T>(), nullptr});
  if (!error)
    error = simplexfix::cuda::project_rows(
        {z.data(), stride, grad_unit.data(), norm.data(), out.data(), rows, d, dtype_of<T>(), nullptr});
  if (error) failed("launch: %s", error);
  for (int64_t i = 0; i < rows; ++i) {
    const auto wide = widened<long double>(z.data() + i * stride, d);
    const auto narrow = widened<A>(z.data() + i * stride, d);
    const A* g = grad_unit.data() + i * d;
    long double squares = 0, dot = 0, size = 0;
    A naive_squares = A(0), naive_dot = A(0);
    for (int64_t j = 0; j < d; ++j) {
      squares += wide[j] * wide[j], dot += wide[j] * g[j], size += std::fabs(wide[j] * g[j]);
      naive_squares += narrow[j] * narrow[j], naive_dot += narrow[j] * g[j];
    }
    const double inverse = squares == 0 ? 0 : double(1 / std::sqrt(squares));
    if (!(std::fabs(double(norm[i]) - inverse) <= 2 * floor_of<A>(inverse)))
      failed("inverse_norms<%s> %lld x %lld, row %lld: %.9g, truth %.9g", Format<T>::kName, (long long)rows,
             (long long)d, (long long)i, double(norm[i]), inverse);
    for (int64_t j = 0; j < d; ++j) {
      const long double coefficient = squares == 0 ? 0 : wide[j] / squares;
      const double want = double(g[j] - coefficient * dot), got = value_of(out[i * d + j]);
      const double naive_error =
          naive_squares == A(0) ? 0 : std::fabs(double(narrow[j] * naive_dot / naive_squares - coefficient * dot));
      const double allowed = 2 * naive_error +
                             floor_of<A>(std::fabs(double(g[j])) + double(std::fabs(coefficient) * size)) +
                             rounding_of<T>(want);
      if (!(std::fabs(got - want) <= allowed))
        failed("project_rows<%s> %lld x %lld: [%lld, %lld] = %.9g, truth %.9g, allowed error %g", Format<T>::kName,
               (long long)rows, (long long)d, (long long)i, (long long)j, got, want, allowed);
    }
  }
  if (!norm.surroundings_untouched() || !out.surroundings_untouched())
    failed("project_rows: wrote outside its results");
}

template <typename A>
void rows_of(bool small) {
  for (int64_t candidates : {1, 2, 7, 31, 33, 255, 256, 257, 1024, 4097})
    for (Negatives negatives : {Negatives::kZeroMask, Negatives::kRemove, Negatives::kInfoNce}) {
      if (small && candidates != 33 && candidates != 257) continue;
      const int64_t rows = std::min<int64_t>(candidates, candidates > 1000 ? 2 : 5);
      for (int classes : {1, 3, 1000}) {  // all candidates share a class; some do; hardly any do
        check_rows<A>(rows, candidates, (candidates - rows) / 2, classes, negatives, true, 0.3);
        if (!small)
          check_rows<A>(rows, candidates, candidates - rows, classes, negatives, false, classes == 3 ? 9 : 0.1);
      }
    }
  check_rows<A>(0, 3, 1, 2, Negatives::kRemove, true, 1);
}

template <typename T>
void features_of(bool small) {
  int turn = 0;
  for (int64_t d : {1, 7, 8, 9, 31, 33, 256, 257, 1023, 1024, 4097}) {
    if (small && d != 9 && d != 257) continue;
    check_features<T>(d > 1000 ? 4 : 13, d, d + turn % 3, turn % 4);
    ++turn;
  }
  check_features<T>(0, 3, 3, 0);
}
}  // namespace

void test_contrast(const Selection& selection) {
  if (selection.has("float")) rows_of<float>(selection.small), features_of<float>(selection.small);
  if (selection.has("double")) rows_of<double>(selection.small), features_of<double>(selection.small);
  if (selection.has("half")) features_of<__half>(selection.small);
  if (selection.has("bfloat16")) features_of<__nv_bfloat16>(selection.small);
}
