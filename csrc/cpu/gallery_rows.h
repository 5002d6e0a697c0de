// A gallery's rows as the search reads them: normalised, in blocks, with one id each.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace simplexfix::cpu {

struct GalleryRows {
  const std::byte* const* blocks;  // of 2^block_shift contiguous rows each; a tensor is one block
  int block_shift;
  int64_t n, d;
  RowType type = RowType::kFloat;
  const int64_t* ids = nullptr;  // nullptr: a row's id is its index
  // bit i % 64 of word i / 64 is set if row i is searched; nullptr: all rows are searched
  const uint64_t* mask = nullptr;
  int64_t searched = n;  // number of rows that are searched

  static constexpr int kOneBlock = 62;  // a block_shift that no number of rows reaches: all rows are one block

  const std::byte* row(int64_t i) const {
    return blocks[i >> block_shift] + (i & ((int64_t(1) << block_shift) - 1)) * row_bytes(type, d);
  }
  // The number of contiguous rows from row i on.
  int64_t run_length(int64_t i) const { return (int64_t(1) << block_shift) - (i & ((int64_t(1) << block_shift) - 1)); }
  int64_t id(int64_t i) const { return ids ? ids[i] : i; }
  uint64_t mask_word(int64_t word) const { return mask ? mask[word] : ~uint64_t(0); }
  bool is_searched(int64_t i) const { return mask_word(i / 64) >> (i % 64) & 1; }
  // Returns row i in fp32: a pointer to the row itself, or to scratch [d] after a conversion.
  const float* read(int64_t i, float* scratch) const {
    const std::byte* from = row(i);
    if (type == RowType::kFloat) return reinterpret_cast<const float*>(from);
    for (int64_t j = 0; j < d; ++j) {
      uint16_t half;
      std::memcpy(&half, from + j * 2, 2);
      const uint32_t bits = uint32_t(half) << 16;
      std::memcpy(scratch + j, &bits, 4);
    }
    return scratch;
  }
};

}  // namespace simplexfix::cpu
