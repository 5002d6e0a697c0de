// Launchers of primitives.cu, whose kernels each use one feature of device.cuh.
#pragma once
#include <cstdint>

#include "../../csrc/cuda/kernels.h"

namespace primitives {

struct Product {
  const void* a;  // [16, 16] of dtype; by columns with `transposed`
  const void* b;  // [8, 16], each row a column of the product's second factor; [16, 8] with `transposed`
  float* c;       // [16, 8]; the product is added to it
  bool transposed;
  simplexfix::cuda::DType dtype;
};
const char* product(const Product&);

// Asynchronous copies in two groups. out[group][thread] = the first `bytes` of the 16 at in + 16 (64 group + 63 -
// thread), then zeros: each thread writes the data that another one copied. If a group is not waited for, the emulator
// leaves 0xff there.
struct Copies {
  const unsigned char* in;  // [2][64][16]
  unsigned char* out;       // [2][64][16]
  int bytes;
  int waited;  // number of groups waited for: 0, 1 or 2
};
const char* copies(const Copies&);

}  // namespace primitives
