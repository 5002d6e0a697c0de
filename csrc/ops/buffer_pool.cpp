#include "buffer_pool.h"

#include <cstdlib>
#include <mutex>

#include "../cpu/fork.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

namespace simplexfix {
namespace {
// Before the numbers: the block's size.  Large blocks of malloc begin at one and the same place in a page, z's as well;
// with both that near to each other the stores of a kernel hold up loads a page away, for a quarter of its time.
constexpr size_t kHeader = 1024;
constexpr size_t kAlign = 64;
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kMostBlocks = 16;
constexpr size_t kWorthKeeping = size_t(1) << 17;  // smaller blocks malloc keeps by itself

// Under fork_mutex(), so that a forked child finds it whole and free.
class BufferPool {
 public:
  BufferPool() { free_.reserve(kMostBlocks); }

  // size bytes of memory, or more, with a header before them
  void* take(size_t size) {
    const size_t wanted = size + kHeader;
    {
      const std::lock_guard lock(cpu::fork_mutex());
      for (auto block = free_.rbegin(); block != free_.rend(); ++block)  // the last one left is the warmest
        if (block->size >= wanted && block->size / 2 < wanted) {
          void* found = block->memory;
          free_bytes_ -= block->size;
          free_.erase(std::next(block).base());
          return static_cast<char*>(found) + kHeader;
        }
    }
    const size_t align = wanted >= 2 * kHugePage ? kHugePage : kAlign;
    const size_t rounded = (wanted + align - 1) / align * align;
    void* memory = std::aligned_alloc(align, rounded);
    if (!memory) throw std::runtime_error(message("not enough memory for a gradient of ", size, " bytes"));
#ifdef __linux__
    if (align == kHugePage) madvise(memory, rounded, MADV_HUGEPAGE);  // a hint: no harm where it fails
#endif
    *static_cast<size_t*>(memory) = rounded;
    return static_cast<char*>(memory) + kHeader;
  }

  void give_back(void* numbers) noexcept {
    void* memory = static_cast<char*>(numbers) - kHeader;
    const size_t size = *static_cast<size_t*>(memory);
    if (size < kWorthKeeping || size > kMostBytes) return std::free(memory);
    const std::lock_guard lock(cpu::fork_mutex());
    while (free_bytes_ + size > kMostBytes || free_.size() == kMostBlocks) {
      free_bytes_ -= free_.front().size;
      std::free(free_.front().memory);
      free_.erase(free_.begin());
    }
    free_.push_back({memory, size});
    free_bytes_ += size;
  }

 private:
  struct Block {
    void* memory;
    size_t size;
  };
  std::vector<Block> free_;  // the oldest first; never grows, so that giving back can't fail
  size_t free_bytes_ = 0;
};

// Never destroyed, since tensors may outlive static objects.  Constructed when the library is loaded, not on first use:
// a child forked during the construction of a function-local static would deadlock on its guard.
BufferPool& g_pool = *new BufferPool;
}  // namespace

Tensor reusable_empty(const std::vector<int64_t>& shape, ScalarType type) {
  int64_t numbers = 1;
  std::vector<int64_t> strides(shape.size());
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = std::max<int64_t>(numbers, 1);
    numbers *= shape[i];
  }
  const size_t bytes = size_t(numbers) * size_t((type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2));
  return torch::stable::from_blob(g_pool.take(bytes), shape, strides,
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), type,
                                  [](void* memory) { g_pool.give_back(memory); });
}

}  // namespace simplexfix
