// Tests tensor cores and asynchronous copies against plain loops: the layout of fragments, the destination of a copy
// before and after the wait, and alignment.
#include "check.h"
#include "primitives.h"
#include "tests.h"

namespace {

// Small integers: exact in both formats and in every order of summation.
template <typename T>
void check_product(bool transposed) {
  ++g_cases;
  Buffer<T> a(256, 0), b(128, 0);
  Buffer<float> c(128, 0);
  std::mt19937 random(7);
  const auto small = [&] { return float(int(random() % 17) - 8); };
  float row[16][16], column[8][16], want[16][8];
  for (auto& r : row)
    for (float& x : r) x = small();
  for (auto& r : column)
    for (float& x : r) x = small();
  for (int i = 0; i < 16; ++i)
    for (int k = 0; k < 16; ++k) a[transposed ? k * 16 + i : i * 16 + k] = T(row[i][k]);
  for (int j = 0; j < 8; ++j)
    for (int k = 0; k < 16; ++k) b[transposed ? k * 8 + j : j * 16 + k] = T(column[j][k]);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j) {
      want[i][j] = c[i * 8 + j] = float(1000 * i + j);
      for (int k = 0; k < 16; ++k) want[i][j] += row[i][k] * column[j][k];
    }
  if (const char* error = primitives::product({a.data(), b.data(), c.data(), transposed, dtype_of<T>()}))
    failed("launch: %s", error);
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 8; ++j)
      if (c[i * 8 + j] != want[i][j])
        failed("mma<%s>%s: [%d][%d] = %g, want %g", Format<T>::kName, transposed ? " of transposed" : "", i, j,
               double(c[i * 8 + j]), double(want[i][j]));
  if (!c.surroundings_untouched()) failed("mma: wrote outside its result");
}

void check_copies(int bytes, int waited) {
  ++g_cases;
  Buffer<unsigned char> in(2 * 64 * 16, 0), out(2 * 64 * 16, 0);
  for (int64_t i = 0; i < in.size(); ++i) in[i] = (unsigned char)(1 + i % 251);
  if (const char* error = primitives::copies({in.data(), out.data(), bytes, waited})) failed("launch: %s", error);
  for (int group = 0; group < 2; ++group)
    for (int thread = 0; thread < 64; ++thread)
      for (int i = 0; i < 16; ++i) {
        const int there = out[(group * 64 + thread) * 16 + i];
        const int want = group >= waited ? 0xff : i < bytes ? in[(group * 64 + 63 - thread) * 16 + i] : 0;
        if (there != want)
          failed("copy of %d bytes, %d groups waited for: group %d, thread %d, byte %d is %d, want %d", bytes, waited,
                 group, thread, i, there, want);
      }
  if (!out.surroundings_untouched()) failed("copies: wrote outside their result");
}

}  // namespace

void test_primitives(const Selection& selection) {
  for (bool transposed : {false, true}) {
    if (selection.has("half")) check_product<__half>(transposed);
    if (selection.has("bfloat16")) check_product<__nv_bfloat16>(transposed);
  }
  for (int bytes : {16, 6, 0})
    for (int waited : {0, 1, 2}) check_copies(bytes, waited);
#ifndef __SANITIZE_THREAD__  // TSan sees the threads of an aborted launch as unordered with later code
  // Thread 0 must have run, or the launch does not count as one of translated PTX.
  if (emulator::g_settings.order != emulator::Order::kForward) return;
  ++g_cases;
  Buffer<unsigned char> in(2 * 64 * 16, 2), out(2 * 64 * 16, 0);
  std::string error;
  try {
    primitives::copies({in.data(), out.data(), 16, 2});
  } catch (const std::exception& e) {
    error = e.what();
  }
  if (error.find("misaligned asynchronous copy") == error.npos)
    failed("a copy from an odd address went through: %s", error.c_str());
#endif
}
