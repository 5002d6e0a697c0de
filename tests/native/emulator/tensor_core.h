// ldmatrix, mma and asynchronous copies, for csrc/cuda/device.cuh and for translated PTX.
#pragma once
#include "cuda_names.h"

namespace emulator {

// Lanes exchange the addresses of rows. Then each lane reads its own numbers, so that sanitizers check the reads.
struct MatrixRows {
  const void* own;
  const void* of[4][2];  // rows of matrix m with the two numbers of this lane
};
template <int kMatrices, bool kTransposed>
void exchange_rows(Warp& warp, unsigned) {
  for (int l = 0; l < 32; ++l)
    for (int m = 0; m < kMatrices; ++m)
      for (int half = 0; half < 2; ++half) {
        const int row = kTransposed ? l % 4 * 2 + half : l / 4;
        static_cast<MatrixRows*>(warp.lane[l]->argument)->of[m][half] =
            static_cast<MatrixRows*>(warp.lane[m * 8 + row]->argument)->own;
      }
}
template <int kMatrices, bool kTransposed>
void ldmatrix(uint32_t* r, const void* row, EMULATOR_CALLER) {
  MatrixRows rows{row, {}};
  wait_for(Wait::kWarp, ~0u, &exchange_rows<kMatrices, kTransposed>, &rows, EMULATOR_SITE);
  const int lane = self->lane;
  for (int m = 0; m < kMatrices; ++m) {
    uint16_t number[2];
    for (int half = 0; half < 2; ++half) {
      const auto* p = static_cast<const uint16_t*>(rows.of[m][half]);
      if (reinterpret_cast<uintptr_t>(p) % 16) die("ldmatrix of a row at no 16-byte boundary", EMULATOR_SITE);
      number[half] = p[kTransposed ? lane / 4 : lane % 4 * 2 + half];
    }
    r[m] = number[0] | uint32_t(number[1]) << 16;
  }
}

struct MmaOperands {
  float* sums;
  const uint32_t *a, *b;
};
template <typename T>
float half_of(uint32_t pair, int half) {
  const auto bits = uint16_t(pair >> (16 * half));
  T number;
  std::memcpy(static_cast<void*>(&number), &bits, sizeof bits);
  return float(number);
}
template <typename T>
void multiply(Warp& warp, unsigned) {
  const auto of = [&](int l) { return static_cast<MmaOperands*>(warp.lane[l]->argument); };
  float a[16][16], b[8][16];  // b by column
  for (int l = 0; l < 32; ++l)
    for (int half = 0; half < 2; ++half) {
      const int g = l / 4, t = l % 4 * 2 + half;
      for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + i / 2 * 8] = half_of<T>(of(l)->a[i], half);
      for (int i = 0; i < 2; ++i) b[g][t + i * 8] = half_of<T>(of(l)->b[i], half);
    }
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      const float *row = a[l / 4 + i / 2 * 8], *column = b[l % 4 * 2 + i % 2];
      float sum = of(l)->sums[i];
      for (int k = 0; k < 16; ++k) sum += row[k] * column[k];
      of(l)->sums[i] = sum;
    }
}
template <typename T>
void mma(float* sums, const uint32_t* a, const uint32_t* b, EMULATOR_CALLER) {
  MmaOperands operands{sums, a, b};
  wait_for(Wait::kWarp, ~0u, &multiply<T>, &operands, EMULATOR_SITE);
}

// The destination is nan from the start of a copy on, and gets its data as late as the waits allow. So a missing wait
// shows in the result, and a buffer that is reused too early does as well.
inline void copy_async(void* to, const void* from, int bytes, EMULATOR_CALLER) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16 || bytes < 0 || bytes > 16)
    die("misaligned asynchronous copy", EMULATOR_SITE);
  // No memset: g++ replaces one of known size by stores that TSan does not check.
  typedef uint64_t Word __attribute__((may_alias));
  for (int i = 0; i < 2; ++i) static_cast<Word*>(to)[i] = ~uint64_t(0);
  const Untracked books;
  self->copies.push_back({to, from, bytes, -1});
}
inline void commit_copies() {
  const Untracked books;
  Lane& l = *self;
  for (Copy& copy : l.copies)
    if (copy.group < 0) copy.group = l.groups;
  ++l.groups;
}
inline void wait_for_copies(int open) {
  for (;;) {
    Copy copy{};
    {
      const Untracked books;
      auto& copies = self->copies;
      if (copies.empty() || copies.front().group < 0 || copies.front().group >= self->groups - open) return;
      copy = copies.front();
      copies.pop_front();
    }
    std::memcpy(copy.to, copy.from, size_t(copy.bytes));
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, size_t(16 - copy.bytes));
  }
}

}  // namespace emulator
