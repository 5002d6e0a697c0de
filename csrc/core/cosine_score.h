// A score of the cosine search, as every device computes it: rows x / |x| rounded to float, their dot
// product in double, rounded to float.  Sums over a row run in eight partial sums (number j goes to sum
// j mod 8), added as ((0 + 4) + (2 + 6)) + ((1 + 5) + (3 + 7)); products of floats are exact in double.
//
// And what a first pass in bfloat16 may leave out.  With rows q, g rounded to q', g' and p the product
// q'.g' that tensor cores found,
//
//   |q.g - p| <= |q| |g - g'| + |q - q'| |g'| + |q'.g' - p|  <  query_error_bound + gallery_error_bound
//
// by a margin of 2^-20, which covers everything else: that scores are rounded to float (two that differ
// by more than 2^-23 stay in order), their double sums, and the float arithmetic on the bounds.
#pragma once
#include "types.h"

namespace simplexfix {

// A number of a normalised row; a zero row stays zero.
SIMPLEXFIX_HD float unit_number(float x, double norm) { return norm > 0 ? float(double(x) / norm) : 0.f; }

// residual: |g - g'|.  |q| is below 1 + 2^-20, and so is the rounding of the bound itself.
SIMPLEXFIX_HD float gallery_error_bound(double residual) { return float(residual * (1 + 0x1p-16)); }

// residual: |q - q'|; |g'| is below 1 + 2^-8.  depth: the number of products, zeros included.  That a tensor
// core's sum of 16 products and what it adds them to is off by at most 32 units (2^-23) of |q'| |g'| is an
// assumption: twice what truncating every term and every sum of four to 24 bits can do.
SIMPLEXFIX_HD float query_error_bound(double residual, int64_t depth) {
  return float(residual * (1 + 0x1p-7) + double(depth) * 0x1p-22 * (1 + 0x1p-6) + 0x1p-20);
}

}  // namespace simplexfix
