// The regular simplex with K = d + 1 vertices in R^d, in closed form: the constants behind
//
//   t_i = e_i (i < d), t_d = a * 1, centred by m * 1, divided by r    (a row of norm 1 each)
//   l_i = (z_i - m S) / r   for i < d,      l_d = (a - m) S / r,      S = sum_j z_j
//
// and, for a gradient g on the logits, (dL/dz)_j = (g_j + a g_d - m sum_i g_i) / r.
// Order and sign are those of deployed models: docs/math.md.
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
    // (1 - sqrt(1 + n)) / n, free of its cancellation
    const double a = -1.0 / (1.0 + std::sqrt(1.0 + n));
    return {a, (1.0 + a) / (n + 1.0), std::sqrt(n / (n + 1.0))};
  }
};

// The same numbers rounded once, on the host, to the type that a kernel computes in: double
// arithmetic, above all a division, is slow on most GPUs.
template <typename A>
struct RoundedSimplex {
  A a, m;
  A last;       // a - m
  A inverse_r;  // 1 / r

  RoundedSimplex(const Simplex& simplex)
      : a(A(simplex.a)), m(A(simplex.m)), last(A(simplex.a - simplex.m)), inverse_r(A(1 / simplex.r)) {}
};

}  // namespace simplexfix
