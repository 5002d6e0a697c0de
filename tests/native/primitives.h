// Launchers of primitives.cu: kernels that do one thing of device.cuh each.
#pragma once
#include <cstdint>

#include "../../csrc/cuda/kernels.h"

namespace primitives {

struct Product {
  const void* a;  // [16, 16] of dtype; by columns with `transposed`
  const void* b;  // [8, 16], each row a column of the product's second factor; [16, 8] with `transposed`
  float* c;       // [16, 8], added to
  bool transposed;
  simplexfix::cuda::DType dtype;
};
const char* product(const Product&);

// out[group][thread] = 16 bytes copied from in + 16 thread in the first group, from in + 16 (thread + 64)
// in the second; `bytes` of each, then zeros.
struct Copies {
  const unsigned char* in;  // [2][64][16]
  unsigned char* out;       // [2][64][16]
  int bytes;
  int waited;  // groups: 0, 1 or 2
};
const char* copies(const Copies&);

}  // namespace primitives
