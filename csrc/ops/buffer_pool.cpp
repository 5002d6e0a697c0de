#include "buffer_pool.h"

#include <cstdlib>
#include <mutex>

#include "../cpu/aligned.h"
#include "../cpu/fork.h"

namespace simplexfix {
namespace {
// A header of this many bytes precedes the numbers and stores the block's size. malloc places large blocks, z's as
// well, at the same offset in a page. Without the header, stores of a kernel would delay its loads from the same offset
// (4K aliasing), which would take a quarter of its time.
constexpr size_t kHeader = 1024;
constexpr size_t kMostBlocks = 16;
constexpr size_t kWorthKeeping = size_t(1) << 17;  // malloc itself keeps smaller blocks

// fork_mutex() guards all members, so a forked child finds them consistent and the mutex free.
class BufferPool {
 public:
  BufferPool() { free_.reserve(kMostBlocks); }

  // Returns at least size bytes of memory, with a header before them.
  void* take(size_t size) {
    const size_t wanted = size + kHeader;
    {
      const std::lock_guard lock(cpu::fork_mutex());
      // Search from the back: the block returned last is the most likely to be cached.
      for (auto block = free_.rbegin(); block != free_.rend(); ++block)
        if (block->size >= wanted && block->size / 2 < wanted) {
          void* found = block->memory;
          free_bytes_ -= block->size;
          free_.erase(std::next(block).base());
          return static_cast<char*>(found) + kHeader;
        }
    }
    const size_t rounded = wanted >= cpu::kLeastHugeBlock ? cpu::whole_huge_pages(wanted) : wanted;
    void* memory = cpu::allocate_pages(rounded);
    if (!memory)
      throw std::runtime_error(
          message("cannot allocate ", size, " bytes for a loss or a gradient: use a smaller batch"));
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
  std::vector<Block> free_;  // oldest first; its capacity is reserved, so give_back() cannot fail
  size_t free_bytes_ = 0;
};

// The pool is never destroyed, since tensors may outlive static objects. It is constructed when the library is loaded,
// not on first use: a child forked during the construction of a function-local static would deadlock on its guard.
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
