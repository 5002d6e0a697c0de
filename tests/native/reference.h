// The reference implementation, written from the definitions in docs/design/math.md and not from csrc/core. The simplex
// is a matrix (above 130 dimensions in closed form). The orthoplex and the cube are lists of vertices; a coded cube has
// too many, and is a product over coordinates. Cross-entropy uses whole rows of logits, and angles use acos.
//
// R = long double gives the truth. R = the kernels' accumulating type gives the naive computation. The kernels' error
// is compared with the error of the latter.
#pragma once
#include <cmath>
#include <cstdint>
#include <vector>

namespace reference {

template <typename R>
class Simplex {
 public:
  explicit Simplex(int64_t d) : d_(d) {
    const R n = R(d);
    a_ = (1 - std::sqrt(1 + n)) / n;
    if (d <= 130) build();
    m_ = (1 + a_) / (n + 1);
    r_ = std::sqrt(n / (n + 1));
  }

  // l = W x
  std::vector<R> times(const std::vector<R>& x) const {
    std::vector<R> l(d_ + 1);
    if (!rows_.empty()) {
      for (int64_t c = 0; c <= d_; ++c)
        for (int64_t j = 0; j < d_; ++j) l[c] += rows_[c * d_ + j] * x[j];
      return l;
    }
    R sum = 0;
    for (R v : x) sum += v;
    for (int64_t c = 0; c < d_; ++c) l[c] = (x[c] - m_ * sum) / r_;
    l[d_] = (a_ - m_) * sum / r_;
    return l;
  }

  // x = W^T g
  std::vector<R> transposed_times(const std::vector<R>& g) const {
    std::vector<R> x(d_);
    if (!rows_.empty()) {
      for (int64_t c = 0; c <= d_; ++c)
        for (int64_t j = 0; j < d_; ++j) x[j] += rows_[c * d_ + j] * g[c];
      return x;
    }
    R sum = 0;
    for (R v : g) sum += v;
    for (int64_t j = 0; j < d_; ++j) x[j] = (g[j] + a_ * g[d_] - m_ * sum) / r_;
    return x;
  }

 private:
  void build() {  // e_i and a * 1, minus their mean, divided by their norms
    rows_.assign((d_ + 1) * d_, R(0));
    for (int64_t i = 0; i < d_; ++i) rows_[i * d_ + i] = 1;
    for (int64_t j = 0; j < d_; ++j) rows_[d_ * d_ + j] = a_;
    for (int64_t j = 0; j < d_; ++j) {
      R mean = 0;
      for (int64_t c = 0; c <= d_; ++c) mean += rows_[c * d_ + j];
      mean /= R(d_ + 1);
      for (int64_t c = 0; c <= d_; ++c) rows_[c * d_ + j] -= mean;
    }
    for (int64_t c = 0; c <= d_; ++c) {
      R square = 0;
      for (int64_t j = 0; j < d_; ++j) square += rows_[c * d_ + j] * rows_[c * d_ + j];
      for (int64_t j = 0; j < d_; ++j) rows_[c * d_ + j] /= std::sqrt(square);
    }
  }

  int64_t d_;
  R a_, m_, r_;
  std::vector<R> rows_;
};

template <typename R>
class Orthoplex {  // e_0, ..., e_{d-1}, -e_0, ..., -e_{d-1}
 public:
  explicit Orthoplex(int64_t d) : d_(size_t(d)) {}
  std::vector<R> times(const std::vector<R>& x) const {
    std::vector<R> l(x);
    for (R v : x) l.push_back(-v);
    return l;
  }
  std::vector<R> transposed_times(const std::vector<R>& g) const {
    std::vector<R> x(d_);
    for (size_t j = 0; j < d_; ++j) x[j] = g[j] - g[d_ + j];
    return x;
  }

 private:
  size_t d_;
};

template <typename R>
class Cube {  // vertex c has 1 / sqrt(d) where bit j of c is set, -1 / sqrt(d) elsewhere
 public:
  explicit Cube(int64_t d) : d_(size_t(d)), side_(1 / std::sqrt(R(d))) {}
  std::vector<R> times(const std::vector<R>& x) const {
    std::vector<R> l(size_t(1) << d_);
    for (size_t c = 0; c < l.size(); ++c)
      for (size_t j = 0; j < d_; ++j) l[c] += at(c, j) * x[j];
    return l;
  }
  std::vector<R> transposed_times(const std::vector<R>& g) const {
    std::vector<R> x(d_);
    for (size_t c = 0; c < g.size(); ++c)
      for (size_t j = 0; j < d_; ++j) x[j] += at(c, j) * g[c];
    return x;
  }

 private:
  R at(size_t c, size_t j) const { return c >> j & 1 ? side_ : -side_; }
  size_t d_;
  R side_;
};

enum class MarginKind { kNone, kCosine, kAngular };

struct Options {
  bool normalize = false;
  double scale = 1;
  MarginKind margin = MarginKind::kNone;
  double margin_size = 0;
  double smoothing = 0;
};

template <typename R>
struct Row {
  R loss;
  std::vector<R> gradient;
  R largest_logit;   // in absolute value
  R plain_gradient;  // largest of the terms of dL/dz, before normalize projects it
  R sine;            // of the angle to the true class; 1 without a margin
};

template <typename R>
struct Unit {
  std::vector<R> u;
  R norm;  // 0 for a zero row, whose u is zero
};
template <typename R>
Unit<R> unit(const std::vector<R>& z) {
  R square = 0;
  for (R v : z) square += v * v;
  Unit<R> unit{z, std::sqrt(square)};
  for (R& v : unit.u) v = unit.norm > 0 ? v / unit.norm : R(0);
  return unit;
}

// Turns the gradient with respect to u = z / |z| into the gradient with respect to z.
template <typename R>
void through_unit(const Unit<R>& unit, std::vector<R>* g) {
  R dot = 0;
  for (size_t j = 0; j < g->size(); ++j) dot += unit.u[j] * (*g)[j];
  for (size_t j = 0; j < g->size(); ++j) (*g)[j] = unit.norm > 0 ? ((*g)[j] - unit.u[j] * dot) / unit.norm : R(0);
}

template <typename R>
R largest(const std::vector<R>& v) {
  R largest = 0;
  for (R x : v) largest = std::fmax(largest, std::fabs(x));
  return largest;
}

// weight: K numbers, or empty.
template <typename Polytope, typename R>
Row<R> cross_entropy(const Polytope& polytope, const Options& options, const std::vector<R>& z, int64_t label,
                     const std::vector<R>& weight) {
  Unit<R> unit{z, R(1)};
  if (options.normalize) unit = reference::unit(z);
  std::vector<R> l = polytope.times(unit.u);
  const int64_t slots = int64_t(l.size());
  R slope = 1;
  Row<R> row{0, {}, 0, 0, 1};
  if (options.margin == MarginKind::kCosine) l[label] -= R(options.margin_size);
  if (options.margin == MarginKind::kAngular) {
    const R m = R(options.margin_size), c = std::fmin(std::fmax(l[label], R(-1)), R(1)), theta = std::acos(c);
    row.sine = std::fabs(std::sin(theta));
    if (theta + m < std::acos(R(-1))) {
      l[label] = std::cos(theta + m);
      slope = row.sine > R(1e-6) ? std::sin(theta + m) / row.sine : std::cos(m);
    } else {
      l[label] = c - m * std::sin(m);
    }
  }
  for (R& v : l) v *= R(options.scale);
  row.largest_logit = largest(l);

  R top = l[0], total = 0;
  for (R v : l) top = std::fmax(top, v);
  for (R v : l) total += std::exp(v - top);
  std::vector<R> target_mass(slots);  // target distribution times the class weights
  for (int64_t c = 0; c < slots; ++c) {
    const R w = weight.empty() ? R(1) : weight[c];
    target_mass[c] = w * (R(options.smoothing) / R(slots) + (c == label ? 1 - R(options.smoothing) : R(0)));
  }
  R mass = 0, other_mass = 0,
    other_probability = 0;  // without the label: 1 - p_label would round to 0 in a confident row
  for (int64_t c = 0; c < slots; ++c) {
    row.loss -= target_mass[c] * (l[c] - top - std::log(total));
    mass += target_mass[c];
    if (c != label) other_mass += target_mass[c];
    if (c != label) other_probability += std::exp(l[c] - top) / total;
  }
  std::vector<R> g(slots);
  for (int64_t c = 0; c < slots; ++c) g[c] = R(options.scale) * (mass * std::exp(l[c] - top) / total - target_mass[c]);
  g[label] = R(options.scale) * (other_mass - mass * other_probability);
  g[label] *= slope;
  row.gradient = polytope.transposed_times(g);
  row.plain_gradient = largest(row.gradient);
  for (int64_t c = 0; c < slots; ++c) {
    const R term =
        c == label ? other_mass + mass * other_probability : mass * std::exp(l[c] - top) / total + target_mass[c];
    row.plain_gradient = std::fmax(row.plain_gradient, R(options.scale) * term);
  }
  if (options.normalize) {
    row.plain_gradient = unit.norm > 0 ? row.plain_gradient / unit.norm : R(0);
    through_unit(unit, &row.gradient);
  }
  return row;
}

// Cross-entropy of the vertex with these signs against all 2^d: no margin, no smoothing, one class weight.
template <typename R>
Row<R> coded_cube(const Options& options, const std::vector<R>& z, const std::vector<bool>& positive, R weight) {
  Unit<R> unit{z, R(1)};
  if (options.normalize) unit = reference::unit(z);
  const R factor = R(options.scale) / std::sqrt(R(z.size()));
  Row<R> row{0, std::vector<R>(z.size()), 0, 0, 1};
  for (size_t j = 0; j < z.size(); ++j) {
    const R s = positive[j] ? R(1) : R(-1), x = -2 * factor * s * unit.u[j];
    row.loss += weight * (std::fmax(x, R(0)) + std::log1p(std::exp(-std::fabs(x))));
    row.gradient[j] = -2 * factor * weight * s / (1 + std::exp(-x));
    row.largest_logit += std::fabs(x);
  }
  row.plain_gradient = 2 * factor * weight;
  if (options.normalize) {
    row.plain_gradient = unit.norm > 0 ? row.plain_gradient / unit.norm : R(0);
    through_unit(unit, &row.gradient);
  }
  return row;
}

template <typename R>
std::vector<R> logits(const Simplex<R>& simplex, bool normalize, double scale, const std::vector<R>& z) {
  std::vector<R> l = simplex.times(normalize ? unit(z).u : z);
  for (R& v : l) v *= R(scale);
  return l;
}

// plain: the largest of the terms of the result, before normalize projects it.
template <typename R>
std::vector<R> logits_backward(const Simplex<R>& simplex, bool normalize, double scale, const std::vector<R>& z,
                               const std::vector<R>& gradient, R* plain) {
  std::vector<R> g = simplex.transposed_times(gradient);
  for (R& v : g) v *= R(scale);
  *plain = std::fmax(largest(g), R(scale) * largest(gradient));
  if (normalize) {
    const Unit<R> unit = reference::unit(z);
    *plain = unit.norm > 0 ? *plain / unit.norm : R(0);
    through_unit(unit, &g);
  }
  return g;
}

}  // namespace reference
