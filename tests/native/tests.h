// The parts of the test program.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../../csrc/cuda/kernels.h"

// The selection of tests on the command line.
struct Selection {
  bool small = false;               // a few shapes of each regime, for the slower layers
  std::vector<std::string> dtypes;  // empty: all
  bool has(const std::string& dtype) const {
    for (const std::string& d : dtypes)
      if (d == dtype) return true;
    return dtypes.empty();
  }
};

template <typename T>
simplexfix::cuda::DType dtype_of() {
  using simplexfix::cuda::DType;
  return std::is_same_v<T, float>    ? DType::kFloat
         : std::is_same_v<T, double> ? DType::kDouble
         : std::is_same_v<T, __half> ? DType::kHalf
                                     : DType::kBFloat16;
}

void test_cross_entropy(const Selection&);
void test_contrast(const Selection&);
void test_logits(const Selection&);
void test_scale_rows(const Selection&);
void test_topk(const Selection&);
void test_primitives(const Selection&);
void test_emulator();
