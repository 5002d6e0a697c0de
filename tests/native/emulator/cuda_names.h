// CUDA's names inside a kernel, for g++: indices, barriers, shuffles.
#pragma once
#include <cmath>
#include <type_traits>

#include "fibers.h"

#define threadIdx (::emulator::self->thread)
#define blockIdx (::emulator::self->block->index)
#define blockDim (::emulator::self->block->threads)
#define gridDim (::emulator::self->block->grid)

inline void __syncthreads(EMULATOR_CALLER) {
  void* order = ::emulator::self->block->order;
  ::emulator::release(order);
  ::emulator::wait_for(::emulator::Wait::kBlock, 0, nullptr, nullptr, EMULATOR_SITE);
  ::emulator::acquire(order);
}
inline void __syncwarp(unsigned mask = ~0u, EMULATOR_CALLER) {
  void* order = ::emulator::self->warp->order + ((mask * 2654435761u) >> 28);
  ::emulator::release(order);
  ::emulator::wait_for(::emulator::Wait::kWarp, mask, nullptr, nullptr, EMULATOR_SITE);
  ::emulator::acquire(order);
}

namespace emulator {

// A shuffle exchanges values and, as on the device, orders no other memory.
template <typename T>
struct Shuffle {
  T value, result;
  int source;
};
template <typename T>
void shuffle_lanes(Warp& warp, unsigned mask) {
  const auto of = [&](int i) { return static_cast<Shuffle<T>*>(warp.lane[i]->argument); };
  for (int i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    if (mask >> of(i)->source & 1)
      of(i)->result = of(of(i)->source)->value;
    else
      std::memset(static_cast<void*>(&of(i)->result), 0xff, sizeof(T));  // undefined on the device
  }
}
template <typename T>
T shuffle(unsigned mask, T value, int source, Site site) {
  static_assert(std::is_trivially_copyable_v<T>);
  Shuffle<T> argument{value, value, source & 31};
  wait_for(Wait::kWarp, mask, &shuffle_lanes<T>, &argument, site);
  return argument.result;
}

// Aborts the launch: launch_kernel() throws `what`. The fiber is never resumed, so it must own nothing.
[[noreturn]] inline void die(const char* what, Site site) {
  self->site = site;
  self->error = std::string(what) + " at " + where(*self);
  for (;;) wait_for(Wait::kWarp, 0, nullptr, nullptr, site);
}

}  // namespace emulator

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, EMULATOR_CALLER) {
  const int lane = ::emulator::self->lane, source = lane ^ lane_mask;
  return ::emulator::shuffle(mask, value, source >= (lane & ~(width - 1)) + width ? lane : source, EMULATOR_SITE);
}

// Atomic only: as on the device, it orders no other memory.
template <typename T>
T atomicAdd(T* p, T value) {
  return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
}
