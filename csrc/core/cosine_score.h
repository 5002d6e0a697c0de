// The score of the cosine search, which has the same bits on every device. Rows are normalised to x / |x| and rounded
// to float. Their dot product is computed in double, where products of floats are exact, and rounded to float. Each sum
// over a row has eight partial sums; number j goes to sum j mod 8. They are added in this order:
//
//   ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7))
//
// This file also has the error bounds of the first pass in bfloat16. Let q', g' be the rows q, g rounded to bfloat16,
// and p the product q'.g' as computed by tensor cores:
//
//   |q.g - p| <= |q| |g - g'| + |q - q'| |g'| + |q'.g' - p|  <  query_error_bound + gallery_error_bound
//
// The last inequality has a margin of 2^-20. It covers all other errors: the rounding of scores to float (scores that
// differ by more than 2^-23 keep their order), of the double sums, and of the bounds themselves.
#pragma once
#include "types.h"

namespace simplexfix {

// Returns x / norm, one number of the normalised row; a zero row stays zero.
SIMPLEXFIX_HD float unit_number(float x, double norm) { return norm > 0 ? float(double(x) / norm) : 0.f; }

// residual: |g - g'|. The factor covers |q| < 1 + 2^-20 and the rounding of the bound itself.
SIMPLEXFIX_HD float gallery_error_bound(double residual) { return float(residual * (1 + 0x1p-16)); }

// residual: |q - q'|; |g'| is below 1 + 2^-8. depth: the number of products, padding included. Assumption: a tensor
// core adds 16 products to its accumulator with an error of at most 32 * 2^-23 |q'| |g'|. That is twice the error if
// every term, and every sum of four terms, is truncated to 24 bits.
SIMPLEXFIX_HD float query_error_bound(double residual, int64_t depth) {
  return float(residual * (1 + 0x1p-7) + double(depth) * 0x1p-22 * (1 + 0x1p-6) + 0x1p-20);
}

}  // namespace simplexfix
