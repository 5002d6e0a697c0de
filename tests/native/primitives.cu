// Kernels that each use one feature of device.cuh, for test_primitives.cpp. Unlike the deliberately invalid kernels of
// test_emulator.cpp, they are also compiled by nvcc: the `ptx` layer translates that PTX, with its inline assembly, to
// C++ and runs it. They must be templates in a named namespace: these have weak symbols, which the strong symbols of
// the translated PTX override.
#include "primitives.h"

#include "../../csrc/cuda/launch.cuh"

namespace primitives {
using namespace simplexfix::cuda;

template <typename T>
struct ProductTiles {
  alignas(16) T a[16][16 + 8];
  alignas(16) T b[16][16 + 8];
};

// c += a b by one warp: a [16, 16], b [16, 8], c [16, 8]. primitives.h has the layouts in memory.
template <typename T>
__global__ void __launch_bounds__(32) product_kernel(const T* g_a, const T* g_b, float* g_c, bool transposed) {
  SIMPLEXFIX_SHARED(s_tiles, ProductTiles<T>);
  const int lane = int(threadIdx.x);
  const int b_columns = transposed ? 8 : 16;
  for (int i = lane; i < 256; i += 32) s_tiles.a[i / 16][i % 16] = g_a[i];
  for (int i = lane; i < 128; i += 32) s_tiles.b[i / b_columns][i % b_columns] = g_b[i];
  sync_team<32>();
  uint32_t a[4], b[2];
  const int matrix = lane / 8, row = lane % 8;
  if (transposed) {
    ldmatrix<true>(a, &s_tiles.a[row + matrix / 2 * 8][matrix % 2 * 8]);
    ldmatrix<true>(b, &s_tiles.b[row + matrix % 2 * 8][0]);
  } else {
    ldmatrix(a, &s_tiles.a[row + matrix % 2 * 8][matrix / 2 * 8]);
    ldmatrix(b, &s_tiles.b[row][matrix % 2 * 8]);
  }
  float sums[4];
  SIMPLEXFIX_UNROLL for (int i = 0; i < 4; ++i) sums[i] = g_c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2];
  mma<T>(sums, a, b);
  SIMPLEXFIX_UNROLL for (int i = 0; i < 4; ++i) g_c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

struct alignas(16) Sixteen {
  unsigned char v[16];
};

// Implements Copies of primitives.h. kWaited: number of groups that are waited for.
template <int kWaited>
__global__ void __launch_bounds__(64) copies_kernel(const unsigned char* g_in, unsigned char* g_out, int bytes) {
  SIMPLEXFIX_SHARED(s_data, Sixteen[2][64]);
  const int thread = int(threadIdx.x);
  for (int group = 0; group < 2; ++group) {
    copy_async(&s_data[group][thread], g_in + (group * 64 + thread) * 16, bytes);
    commit_copies();
  }
  if constexpr (kWaited > 0) wait_for_copies<2 - kWaited>();
  sync_team<64>();
  for (int group = 0; group < 2; ++group)  // each thread reads what another thread copied
    reinterpret_cast<Sixteen*>(g_out)[group * 64 + thread] = s_data[group][63 - thread];
}

namespace {
template <typename T>
const char* launch(const Product& p) {
  return launch_kernel(product_kernel<T>, 1, 32, 0, nullptr, static_cast<const T*>(p.a), static_cast<const T*>(p.b),
                       p.c, p.transposed);
}
}  // namespace

const char* product(const Product& p) { return p.dtype == DType::kHalf ? launch<__half>(p) : launch<__nv_bfloat16>(p); }

const char* copies(const Copies& p) {
  const auto kernel = p.waited == 0 ? copies_kernel<0> : p.waited == 1 ? copies_kernel<1> : copies_kernel<2>;
  return launch_kernel(kernel, 1, 64, 0, nullptr, p.in, p.out, p.bytes);
}

}  // namespace primitives
