// Memory for the rows of a growing gallery. Each block has 2^shift rows, the most that fit into 1 MiB, or one row that
// is larger. Blocks never move, so growth needs no second copy.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "gallery_rows.h"

namespace simplexfix::cpu {

class RowBlocks {
 public:
  RowBlocks(int64_t d, RowType type);
  RowBlocks(const RowBlocks&) = delete;
  RowBlocks& operator=(const RowBlocks&) = delete;
  ~RowBlocks();

  // Allocates memory for n rows. If growing throws, nothing has changed; shrinking cannot fail.
  void resize(int64_t n);
  // Memory of row i, of row_bytes(type, d) bytes; valid until resize() drops the row.
  std::byte* row(int64_t i);
  int64_t rows_per_block() const { return int64_t(1) << shift_; }
  GalleryRows view(int64_t n) const { return {blocks_.data(), shift_, n, d_, type_}; }
  size_t bytes() const;

 private:
  size_t block_bytes() const { return size_t(row_bytes(type_, d_)) << shift_; }
  void free_from(size_t block);

  int64_t d_;
  RowType type_;
  int shift_ = 0;
  std::vector<std::byte*> blocks_;
};

}  // namespace simplexfix::cpu
