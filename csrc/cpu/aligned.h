// Uninitialised memory: arrays aligned to a cache line, which is as long as the widest vector, and large blocks in huge
// pages.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <new>
#ifdef __linux__
#include <sys/mman.h>
#endif

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

constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kLeastHugeBlock = 2 * kHugePage;  // least size for which allocate_pages() requests huge pages
// Rounds size up to whole huge pages.
constexpr size_t whole_huge_pages(size_t size) { return (size + kHugePage - 1) / kHugePage * kHugePage; }

// Allocates memory that long loops read or write, or returns nullptr; std::free frees it. Huge pages are read a fifth
// faster than small ones. A last incomplete huge page consists of small pages.
inline void* allocate_pages(size_t size) {
  const bool huge = size >= kLeastHugeBlock;
  void* memory = nullptr;
  if (posix_memalign(&memory, huge ? kHugePage : size_t(kCacheLine), size) != 0) return nullptr;
#ifdef __linux__
  if (huge) madvise(memory, size, MADV_HUGEPAGE);  // a hint: failure does no harm
#endif
  return memory;
}

}  // namespace simplexfix::cpu
