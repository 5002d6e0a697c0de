// Fibers: stacks, the context switch, and the loop that schedules the lanes of a block.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <random>
#include <stdexcept>

#include "block.h"

extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.weak emulator_switch
.type emulator_switch,@function
emulator_switch:
 pushq %rbp
 pushq %rbx
 pushq %r12
 pushq %r13
 pushq %r14
 pushq %r15
 movq %rsp,(%rdi)
 movq %rsi,%rsp
 popq %r15
 popq %r14
 popq %r13
 popq %r12
 popq %rbx
 popq %rbp
 ret
.size emulator_switch,.-emulator_switch
)");
#else
#error "the emulator has a context switch for x86-64 alone"
#endif

namespace emulator {

#if defined(EMULATOR_ASAN) || defined(EMULATOR_TSAN)
constexpr size_t kStackBytes = 96 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif
constexpr size_t kGuardBytes = 4096;

// The order in which lanes (and blocks) run between synchronisations.
enum class Order { kForward, kReverse, kRandom };

EMULATOR_SWITCHES inline void leave_lane() {  // switches from the running lane to the scheduler
  Lane* l = self;
  Block& block = *l->block;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(l->wait == Wait::kDone ? nullptr : &l->asan_stack, block.main_stack,
                                 block.main_stack_size);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(block.main_tsan_fiber, 1);  // 1: a switch does not synchronize
#endif
  emulator_switch(&l->stack_pointer, block.main_stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(l->asan_stack, nullptr, nullptr);
#endif
}

inline void enter_lane(Lane& l) {
  Block& block = *l.block;
  self = &l;
#ifdef EMULATOR_ASAN
  __sanitizer_start_switch_fiber(&block.main_asan_stack, l.stack, kStackBytes);
#endif
#ifdef EMULATOR_TSAN
  __tsan_switch_to_fiber(l.tsan_fiber, 1);
#endif
  emulator_switch(&block.main_stack_pointer, l.stack_pointer);
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(block.main_asan_stack, nullptr, nullptr);
#endif
}

// Blocks the running lane until arrived() releases it.
EMULATOR_SWITCHES inline void wait_for(Wait kind, unsigned mask, WarpFunction function, void* argument, Site site) {
  Lane& l = *self;
  l.wait = kind;
  l.mask = mask;
  l.function = function;
  l.argument = argument;
  l.site = site;
  leave_lane();
}

inline char g_launch_order;  // address that stands for the end of a launch in TSan

EMULATOR_SWITCHES inline void lane_entry() {
  Lane* l = self;
#ifdef EMULATOR_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &l->block->main_stack, &l->block->main_stack_size);
#endif
  (*l->block->body)();
  release(&g_launch_order);
  {
    const Untracked books;
    l->wait = Wait::kDone;
  }
  leave_lane();
  std::abort();
}

class Stacks {
 public:
  void* get() {
#ifdef EMULATOR_TSAN
    if (void* p = std::malloc(kStackBytes)) return p;  // malloc clears TSan's record of earlier accesses
#else
    char* p = nullptr;
    if (!free_.empty()) {
      p = static_cast<char*>(free_.back());
      free_.pop_back();
    } else {
      void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("emulator: no memory for stacks");
      mprotect(memory, kGuardBytes, PROT_NONE);
      p = static_cast<char*>(memory) + kGuardBytes;
    }
#ifdef EMULATOR_ASAN
    __asan_unpoison_memory_region(p, kStackBytes);  // the frames of a fiber that never returned
#endif
    return p;
#endif
    throw std::runtime_error("emulator: no memory for stacks");
  }
  void put(void* p) {
#ifdef EMULATOR_TSAN
    std::free(p);
#else
    free_.push_back(p);
#endif
  }
  ~Stacks() {
    for (void* p : free_) munmap(static_cast<char*>(p) - kGuardBytes, kGuardBytes + kStackBytes);
  }

 private:
  std::vector<void*> free_;
};
inline Stacks g_stacks;

inline void make_fiber(Lane& l) {
  l.stack = g_stacks.get();
  // Staggered for the cache. The null return address below the entry address ends stack traces.
  void** top = reinterpret_cast<void**>(static_cast<char*>(l.stack) + kStackBytes - l.lane * 128) - 2;
  l.stack_pointer = top - 6;
  std::memset(l.stack_pointer, 0, 8 * sizeof(void*));
  *top = reinterpret_cast<void*>(&lane_entry);  // popped by emulator_switch's ret
#ifdef EMULATOR_TSAN
  l.tsan_fiber = __tsan_create_fiber(0);
#endif
}

inline void run_block(Block& block, Order order, std::mt19937& random) {
  const int n = int(block.lanes.size());
  std::vector<int> turns(n);
  for (int i = 0; i < n; ++i) turns[i] = order == Order::kReverse ? n - 1 - i : i;
  if (order == Order::kRandom) std::shuffle(turns.begin(), turns.end(), random);
#ifdef EMULATOR_TSAN
  block.main_tsan_fiber = __tsan_get_current_fiber();
#endif
  for (Lane& l : block.lanes) make_fiber(l);
  while (block.done < n && block.error.empty()) {
    bool progress = false;
    if (order == Order::kRandom && random() % 8 == 0) std::shuffle(turns.begin(), turns.end(), random);
    for (int i : turns) {
      Lane& l = block.lanes[i];
      while (l.wait == Wait::kNone && block.error.empty()) {  // until it blocks, so other lanes see its writes late
        progress = true;
        enter_lane(l);
        arrived(l);
        if (order == Order::kRandom) break;
      }
    }
    if (progress || !block.error.empty()) continue;
    for (const Lane& l : block.lanes)
      if (l.wait == Wait::kBlock || l.wait == Wait::kWarp) fail(block, "deadlock, e.g. " + where(l));
  }
  self = nullptr;
  for (Lane& l : block.lanes) {
#ifdef EMULATOR_TSAN
    __tsan_destroy_fiber(l.tsan_fiber);
#endif
    g_stacks.put(l.stack);
  }
}

}  // namespace emulator
