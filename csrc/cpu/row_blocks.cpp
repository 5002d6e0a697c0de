#include "row_blocks.h"

#include "aligned.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kBlockBytes = int64_t(1) << 20;
}  // namespace

RowBlocks::RowBlocks(int64_t d, RowType type) : d_(d), type_(type) {
  while ((row_bytes(type, d) << (shift_ + 1)) <= kBlockBytes) ++shift_;
}

RowBlocks::~RowBlocks() { free_from(0); }

void RowBlocks::free_from(size_t block) {
  for (size_t i = block; i < blocks_.size(); ++i) FreeAligned()(blocks_[i]);
  blocks_.resize(block);
}

void RowBlocks::resize(int64_t n) {
  const auto wanted = size_t(ceil_div(n, rows_per_block())), before = blocks_.size();
  if (wanted <= before) return free_from(wanted);
  try {
    while (blocks_.size() < wanted) {
      blocks_.push_back(nullptr);
      blocks_.back() = aligned_array<std::byte>(block_bytes()).release();
    }
  } catch (...) {
    free_from(before);
    throw;
  }
}

std::byte* RowBlocks::row(int64_t i) {
  return blocks_[size_t(i >> shift_)] + (i & (rows_per_block() - 1)) * row_bytes(type_, d_);
}

size_t RowBlocks::bytes() const { return blocks_.size() * block_bytes() + blocks_.capacity() * sizeof(std::byte*); }

}  // namespace simplexfix::cpu
