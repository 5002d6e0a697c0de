// Uninitialised arrays, aligned to a cache line, which is as long as the widest vector.
#pragma once
#include <cstddef>
#include <memory>
#include <new>

namespace simplexfix::cpu {

constexpr std::align_val_t kCacheLine{64};

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, kCacheLine); }
};
template <typename T>
using AlignedArray = std::unique_ptr<T[], FreeAligned>;

template <typename T>
AlignedArray<T> aligned_array(size_t n) {
  return AlignedArray<T>(static_cast<T*>(::operator new(n * sizeof(T), kCacheLine)));
}

}  // namespace simplexfix::cpu
