// The state of a running block: its lanes (CUDA threads), its warps, and the rules of barriers and collectives.
#pragma once
#include <vector_types.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <string>
#include <vector>

#include "sanitizers.h"

namespace emulator {

struct Site {
  const char* file;
  int line;
};
// Default arguments that hold the caller's file and line.
#define EMULATOR_CALLER const char *file_ = __builtin_FILE(), int line_ = __builtin_LINE()
#define EMULATOR_SITE \
  ::emulator::Site { file_, line_ }

enum class Wait : uint8_t { kNone, kBlock, kWarp, kDone };
struct Block;
struct Warp;
using WarpFunction = void (*)(Warp&, unsigned mask);  // runs once, when every lane of mask has arrived

struct Copy {  // an asynchronous copy of 16 bytes: `bytes` from memory, then zeros
  void* to;
  const void* from;
  int bytes;
  int64_t group;  // -1: not committed
};

struct Lane {
  uint3 thread{};
  int lane = 0;  // index in its warp
  Block* block = nullptr;
  Warp* warp = nullptr;
  Wait wait = Wait::kNone;
  unsigned mask = 0;  // mask of the collective at which it waits
  WarpFunction function = nullptr;
  void* argument = nullptr;
  Site site{"", 0};
  std::string error;  // set by the lane itself to end the launch
  void* stack = nullptr;
  void* stack_pointer = nullptr;
  void* asan_stack = nullptr;
  void* tsan_fiber = nullptr;
  std::deque<Copy> copies;  // pending, in order
  int64_t groups = 0;       // number of committed groups
};

struct Warp {
  Lane* lane[32] = {};
  int waiting = 0;        // lanes that wait at a collective
  int missing = 32;       // lanes that have exited or that the block does not have
  char* order = nullptr;  // 16 addresses that stand for this warp's barriers in TSan, by mask
};

struct SharedObject {
  const void* key;
  void* memory;
};

struct Block {
  uint3 index{};
  dim3 threads, grid;
  std::vector<Lane> lanes;
  std::vector<Warp> warps;
  std::vector<SharedObject> shared;
  void* dynamic_shared = nullptr;
  int done = 0, at_barrier = 0;
  char* order = nullptr;  // address that stands for this block's barrier in TSan
  const std::function<void()>* body = nullptr;
  void* main_stack_pointer = nullptr;
  void* main_tsan_fiber = nullptr;
  void* main_asan_stack = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
  std::string error;
};

inline Lane* self = nullptr;  // the running lane

inline std::string where(const Lane& l) {
  char text[512];
  std::snprintf(text, sizeof text, "block(%u,%u,%u) thread(%u,%u,%u) %s:%d", l.block->index.x, l.block->index.y,
                l.block->index.z, l.thread.x, l.thread.y, l.thread.z, l.site.file, l.site.line);
  return text;
}

inline void fail(Block& block, const std::string& what) {
  if (block.error.empty()) block.error = what;
}

// Lane l has arrived at a collective. Checks it against the lanes in its mask, and runs it when all of them are there.
inline void arrive_at_collective(Lane& l) {
  Block& block = *l.block;
  Warp& warp = *l.warp;
  const int wanted = __builtin_popcount(l.mask);
  if (!(l.mask >> l.lane & 1)) return fail(block, "lane not in its own mask at " + where(l));
  if (++warp.waiting < wanted && !warp.missing) return;
  for (int i = 0; i < 32; ++i) {
    if (!(l.mask >> i & 1)) continue;
    if (!warp.lane[i]) return fail(block, "mask names a lane that the block does not have at " + where(l));
    const Lane& other = *warp.lane[i];
    if (other.wait == Wait::kDone) return fail(block, "mask names a lane that has exited at " + where(l));
    if (other.wait != Wait::kWarp) return;
    if (other.mask != l.mask || other.function != l.function || other.site.line != l.site.line) {
      if (other.mask & l.mask)
        fail(block, "lanes of a warp meet at different collectives: " + where(l) + " vs " + where(other));
      return;
    }
  }
  warp.waiting -= wanted;
  if (l.function) l.function(warp, l.mask);
  for (int i = 0; i < 32; ++i)
    if (l.mask >> i & 1) warp.lane[i]->wait = Wait::kNone;
}

// Called when lane l has arrived at a barrier or ended. Releases the lanes that may continue, or sets the error.
inline void arrived(Lane& l) {
  Block& block = *l.block;
  if (!l.error.empty()) return fail(block, l.error);
  if (l.wait == Wait::kWarp) return arrive_at_collective(l);
  if (l.wait == Wait::kBlock) ++block.at_barrier;
  if (l.wait == Wait::kDone) {
    ++block.done;
    ++l.warp->missing;
    for (const Lane* other : l.warp->lane)
      if (other && other->wait == Wait::kWarp && (other->mask >> l.lane & 1))
        return fail(block, "thread exited while others of its warp wait for it: " + where(*other));
  }
  if (!block.at_barrier || block.at_barrier + block.done != int(block.lanes.size())) return;
  for (const Lane& other : block.lanes) {
    if (block.done && other.wait == Wait::kBlock)
      return fail(block, "__syncthreads() that not all threads of the block reach: " + where(other));
    if (!block.done && (other.site.line != l.site.line || std::strcmp(other.site.file, l.site.file)))
      return fail(block, "threads meet at different __syncthreads(): " + where(l) + " vs " + where(other));
  }
  block.at_barrier = 0;
  for (Lane& other : block.lanes) other.wait = Wait::kNone;
}

// Fills memory with nan bit patterns, so that a read before any write shows in the result.
inline void* shared_alloc(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 128, bytes ? bytes : 1)) std::abort();
  std::memset(p, 0xff, bytes);
  return p;
}
inline void* shared_object(const void* key, size_t bytes) {
  const Untracked books;
  Block& block = *self->block;
  for (const SharedObject& s : block.shared)
    if (s.key == key) return s.memory;
  block.shared.push_back({key, shared_alloc(bytes)});
  return block.shared.back().memory;
}
template <typename T>
T& static_shared(const void* key) {
  return *static_cast<T*>(shared_object(key, sizeof(T)));
}
inline void* dynamic_shared() { return self->block->dynamic_shared; }

}  // namespace emulator
