// Reports the fibers to ASan and TSan; empty in a plain build.
#pragma once
#include <cstddef>

#if defined(__SANITIZE_THREAD__)
#define EMULATOR_TSAN 1
extern "C" {
void* __tsan_get_current_fiber(void);
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
// TSan keeps a shadow call stack per fiber: a function that switches fibers must not be on it.
#define EMULATOR_SWITCHES __attribute__((no_sanitize("thread"), noinline))
#else
#define EMULATOR_SWITCHES
#endif

#if defined(__SANITIZE_ADDRESS__)
#define EMULATOR_ASAN 1
extern "C" {
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
void __asan_unpoison_memory_region(const volatile void*, size_t);
}
#endif

namespace emulator {

// During its lifetime TSan ignores accesses: those to the emulator's own data are not the kernel's.
struct Untracked {
#ifdef EMULATOR_TSAN
  Untracked() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Untracked() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
#else
  Untracked() {}
#endif
};

// Tell TSan that writes before release(p) are visible after a later acquire(p).
inline void release([[maybe_unused]] void* p) {
#ifdef EMULATOR_TSAN
  __tsan_release(p);
#endif
}
inline void acquire([[maybe_unused]] void* p) {
#ifdef EMULATOR_TSAN
  __tsan_acquire(p);
#endif
}

}  // namespace emulator
