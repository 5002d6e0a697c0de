// Runs work on the calling thread and on a pool of threads that all calls share. The caller begins at once. It waits at
// the end, and only for threads that have begun: on a busy machine a thread may begin much later, or never in this
// call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "interrupt.h"

namespace simplexfix::cpu {

// Fewest numbers to write per thread that is awake: a few microseconds, which is longer than it takes to begin.
constexpr int64_t kNumbersPerThread = int64_t(1) << 14;
// Fewest numbers to write per thread that is woken. It begins after 25 us, and waking it takes the caller 8.
constexpr int64_t kNumbersPerWokenThread = int64_t(1) << 17;

// Returns the number of threads that are worth having for the work, the caller included, at most `most`.
inline int64_t threads_for(double numbers, double per_thread, int64_t most) {
  return int64_t(std::clamp(numbers / per_thread, 1.0, double(most)));
}

// Calls body(context, thread) on the calling thread, as thread 0, and on up to threads - 1 threads of the pool, which
// have other numbers from 1 on. At most woken - 1 of these are woken if they sleep. Each body must take its work from
// what the others have left, because any number of them may come. Returns when the caller's body and all that have
// begun have ended. Then it rethrows the first exception. interrupt belongs to the calling thread, or is nullptr; it is
// checked while the caller waits.
void run_on_threads(int64_t threads, int64_t woken, void (*body)(void* context, int64_t thread), void* context,
                    Interrupt* interrupt);

// run_on_threads() for a callable body(thread).
template <typename Body>
void on_threads(int64_t threads, int64_t woken, const Body& body, Interrupt* interrupt = nullptr) {
  const auto call = [](void* context, int64_t thread) { (*static_cast<const Body*>(context))(thread); };
  run_on_threads(threads, woken, call, const_cast<Body*>(&body), interrupt);
}

// Calls work(task) for the tasks [0, n) in any order, on at most `threads` threads, the caller included. After an
// exception no further task begins. The interrupt is checked before each task; long tasks must check it themselves.
template <typename Work>
void parallel(int64_t n, int64_t threads, const Work& work, Interrupt* interrupt = nullptr) {
  std::atomic<int64_t> next{0};
  const auto run = [&](int64_t) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        if (interrupt) interrupt->check();
        work(task);
      }
    } catch (...) {
      next = n;
      throw;
    }
  };
  on_threads(std::min(n, threads), threads, run, interrupt);
}

// Calls work(begin, end) on ranges that together cover [0, n), on at most `threads` threads. Each thread begins with
// its own part of [0, n), the same in every call, so that the part is in its caches. Then it takes chunks of the other
// parts: threads of a shared machine are seldom equally fast. An item takes the time to write `numbers` numbers.
template <typename Work>
void parallel_ranges(int64_t n, int64_t numbers, int64_t threads, const Work& work) {
  constexpr int64_t kMost = 256, kChunks = 8;  // parts, and chunks per part
  const int64_t least = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers));
  const int64_t parts = std::clamp<int64_t>(n / least, 1, std::min(threads, kMost));
  if (parts == 1) {
    if (n > 0) work(int64_t(0), n);
    return;
  }
  const int64_t chunk = std::max(least, n / (parts * kChunks));
  const auto start_of = [&](int64_t part) { return part * n / parts; };
  std::atomic<int64_t> next[kMost];
  for (int64_t part = 0; part < parts; ++part) next[part].store(start_of(part), std::memory_order_relaxed);
  const int64_t woken = threads_for(double(n) * double(numbers), double(kNumbersPerWokenThread), parts);
  on_threads(parts, woken, [&](int64_t thread) {
    for (int64_t i = 0; i < parts; ++i) {
      const int64_t part = (thread + i) % parts, end = start_of(part + 1);
      for (int64_t at; (at = next[part].fetch_add(chunk, std::memory_order_relaxed)) < end;)
        work(at, std::min(end, at + chunk));
    }
  });
}

}  // namespace simplexfix::cpu
