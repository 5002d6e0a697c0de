// Launches kernels in the emulator, in place of launch_kernel in csrc/cuda/launch.cuh.
#pragma once
#include <memory>

#include "fibers.h"

namespace emulator {

// Settings of the launches that follow; the tests set them.
struct Settings {
  Order order = Order::kForward;
  unsigned seed = 1;
};
inline Settings g_settings;
inline int64_t g_launches = 0;      // launches so far
inline int64_t g_ptx_launches = 0;  // launches of kernels that ptx2cpp.py has translated

// Runs the kernel's blocks one after another. Throws errors that a GPU might not have detected.
template <typename... P>
const char* launch_kernel(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, void*, P... params) {
  const Untracked whole;
  if (threads < 1 || threads > 1024 || blocks < 1 || blocks > 2147483647 || shared_bytes < 0 || shared_bytes > 49152)
    return "invalid configuration argument";
  ++g_launches;
  const std::function<void()> body = [&] { kernel(params...); };
  std::mt19937 random(g_settings.seed);
  // One per block, and never reused: TSan must see blocks as unordered.
  std::vector<std::unique_ptr<char[]>> orders;
  for (int64_t k = 0; k < blocks; ++k) {
    Block block;
    block.index = {unsigned(g_settings.order == Order::kForward ? k : blocks - 1 - k), 0, 0};
    block.threads = dim3(unsigned(threads));
    block.grid = dim3(unsigned(blocks));
    block.body = &body;
    block.lanes.resize(threads);
    block.warps.resize((threads + 31) / 32);
#ifndef EMULATOR_TSAN
    orders.clear();
#endif
    orders.emplace_back(new char[16 * (block.warps.size() + 1)]);
    block.order = orders.back().get();
    for (size_t w = 0; w < block.warps.size(); ++w) block.warps[w].order = block.order + 16 * (w + 1);
    for (int t = 0; t < threads; ++t) {
      Lane& l = block.lanes[t];
      l.block = &block;
      l.lane = t % 32;
      l.warp = &block.warps[t / 32];
      l.thread = {unsigned(t), 0, 0};
      l.warp->lane[l.lane] = &l;
      --l.warp->missing;
    }
    block.dynamic_shared = shared_alloc(size_t(shared_bytes));
    run_block(block, g_settings.order, random);
    std::free(block.dynamic_shared);
    for (const SharedObject& s : block.shared) std::free(s.memory);
    if (!block.error.empty()) throw std::runtime_error("emulator: " + block.error);
  }
  acquire(&g_launch_order);
  return nullptr;
}

}  // namespace emulator
