// The regular simplex with K = d + 1 vertices in R^d, in closed form. The constants a, m, r define the vertices and so
// the logits:
//
//   t_i = e_i for i < d, t_d = a * 1;  vertex i = (t_i - m * 1) / r has norm 1
//   l_i = (z_i - m S) / r   for i < d,      l_d = (a - m) S / r,      S = sum_j z_j
//
// For a gradient g on the logits, (dL/dz)_j = (g_j + a g_d - m sum_i g_i) / r. The order and the sign of the
// vertices must never change: stored galleries depend on them (docs/design/math.md).
#pragma once
#include <cmath>
#include <cstdint>

#include "types.h"

namespace simplexfix {

struct Simplex {
  double a;  // the coordinate of the last vertex before centring
  double m;  // the coordinate of the mean vertex
  double r;  // the norm of a centred vertex

  static Simplex of_dimension(int64_t d) {
    const double n = static_cast<double>(d);
    // (1 - sqrt(1 + n)) / n without cancellation.
    const double a = -1.0 / (1.0 + std::sqrt(1.0 + n));
    return {a, (1.0 + a) / (n + 1.0), std::sqrt(n / (n + 1.0))};
  }
};

// The same constants, rounded once on the host to the type in which a kernel computes. Double arithmetic, divisions
// above all, is slow on most GPUs.
template <typename A>
struct RoundedSimplex {
  A a, m;
  A last;       // a - m
  A inverse_r;  // 1 / r

  RoundedSimplex(const Simplex& simplex)
      : a(A(simplex.a)), m(A(simplex.m)), last(A(simplex.a - simplex.m)), inverse_r(A(1 / simplex.r)) {}
};

}  // namespace simplexfix
