// Tests of the emulator itself: it must reject invalid barriers and shuffles, accept valid kernels, and fill shared
// memory with nan.
#include <string>

#include "../../csrc/cuda/device.cuh"
#include "check.h"
#include "tests.h"

namespace {
__global__ void barrier_for_some(int* out) {
  if (threadIdx.x < 40) __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void two_barriers(int* out) {
  if (threadIdx.x < 40)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}
__global__ void early_exit(int* out) {
  if (threadIdx.x == 5) return;
  out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void shuffle_in_a_whole_warp(int* out) { out[threadIdx.x] = __shfl_xor_sync(~0u, int(threadIdx.x), 1); }
__global__ void outside_its_mask(int* out) { out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, 1, 1); }
__global__ void divergent_shuffle(int* out) {
  if (threadIdx.x & 1)
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
  else
    out[threadIdx.x] = __shfl_xor_sync(~0u, 1, 1);
}
__global__ void last_left_unset(float* out) {
  SIMPLEXFIX_SHARED(s_values, float[64]);
  if (threadIdx.x < 63) s_values[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = s_values[threadIdx.x];
}
__global__ void reversed(int* out) {
  SIMPLEXFIX_DYNAMIC_SHARED(s_values, int);
  s_values[threadIdx.x] = int(threadIdx.x);
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = s_values[blockDim.x - 1 - threadIdx.x];
}

// Fails unless launch() throws an error that contains the text; an empty text expects no error.
template <typename F>
void expect(const char* name, const std::string& text, F&& launch) {
  ++g_cases;
  std::string error;
  try {
    launch();
  } catch (const std::exception& e) {
    error = e.what();
  }
  if (text.empty() ? !error.empty() : error.find(text) == error.npos)
    failed("emulator: %s: expected an error with \"%s\" (none if empty), got \"%s\"", name, text.c_str(),
           error.c_str());
}
}  // namespace

void test_emulator() {
  using emulator::launch_kernel;
  for (const auto order : {emulator::Order::kForward, emulator::Order::kReverse, emulator::Order::kRandom}) {
    emulator::g_settings = {order, 3};
    std::vector<int> out(192);
    std::vector<float> values(64);
    int* p = out.data();
    expect("barrier for some", "__syncthreads() that not all",
           [&] { launch_kernel(barrier_for_some, 1, 64, 0, nullptr, p); });
    expect("two barriers", "different __syncthreads()", [&] { launch_kernel(two_barriers, 1, 64, 0, nullptr, p); });
    expect("early exit", "exited", [&] { launch_kernel(early_exit, 1, 32, 0, nullptr, p); });
    expect("partial warp", "does not have", [&] { launch_kernel(shuffle_in_a_whole_warp, 1, 40, 0, nullptr, p); });
    expect("mask", "own mask", [&] { launch_kernel(outside_its_mask, 1, 32, 0, nullptr, p); });
    expect("divergent shuffle", "different collectives",
           [&] { launch_kernel(divergent_shuffle, 1, 32, 0, nullptr, p); });
    expect("shared memory starts as nan", "",
           [&] { launch_kernel(last_left_unset, 1, 64, 0, nullptr, values.data()); });
    if (!(values[62] == 1 && std::isnan(values[63])))
      failed("emulator: expected 1 in set and nan in unset shared memory, got %g and %g", values[62], values[63]);
    expect("reversed", "", [&] { launch_kernel(reversed, 3, 64, 64 * 4, nullptr, p); });
    for (int i = 0; i < 192; ++i)
      if (out[i] != 63 - i % 64) failed("emulator: reversed[%d] = %d", i, out[i]);
  }
}
