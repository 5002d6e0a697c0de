// Runs work on the calling thread and on a pool of threads that all calls of the process share. The caller begins at
// once. At the end it waits only for the threads that have begun its work: on a busy machine other threads may get no
// core before the work is done.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>

#include "interrupt.h"

namespace simplexfix::cpu {

// One more thread is worth it for this many numbers to write. A thread that is awake joins a call within 0.2 us, so a
// few microseconds of work are enough.
constexpr int64_t kNumbersPerThread = int64_t(1) << 14;
// A thread that sleeps begins after 25 us, and waking it takes the caller 8 us.
constexpr int64_t kNumbersPerWokenThread = int64_t(1) << 17;

// Returns the number of threads for the work, the caller included: one for each per_thread numbers, in [1, most].
inline int64_t threads_for(double numbers, double per_thread, int64_t most) {
  return int64_t(std::clamp(numbers / per_thread, 1.0, double(most)));
}

// Calls body(context, thread) once on the calling thread, where thread is 0, and 0 to threads - 1 times on threads of
// the pool. So every body must take tasks until none is left.
// - thread is the process-wide number of the pool's thread, from 1 on. It may exceed threads - 1, and one thread may
//   call body several times, one after the other.
// - At most woken - 1 sleeping threads are woken.
// - Each body computes with the caller's rounding mode and treatment of denormals.
// - Returns when every body that has begun has ended. Then it rethrows an exception, the caller's own if there is one.
// - interrupt, which may be nullptr, was constructed on the calling thread. It is checked while the caller waits.
void run_on_threads(int64_t threads, int64_t woken, void (*body)(void* context, int64_t thread), void* context,
                    Interrupt* interrupt);

// run_on_threads() for a callable body(thread).
template <typename Body>
void on_threads(int64_t threads, int64_t woken, const Body& body, Interrupt* interrupt = nullptr) {
  const auto call = [](void* context, int64_t thread) { (*static_cast<const Body*>(context))(thread); };
  run_on_threads(threads, woken, call, const_cast<Body*>(&body), interrupt);
}

// Calls work(task) for the tasks [0, n) in any order, on at most `threads` threads, the caller included. After an
// exception no thread takes another task. The interrupt is checked before each task; long tasks must check it
// themselves.
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

// Calls work(begin, end) on ranges that together cover [0, n), on at most `threads` threads. [0, n) is divided into
// parts, and parts into chunks. Thread t begins with part t modulo the number of parts. That is the same part in every
// call of this size, so it may still be in the thread's caches. Then it takes chunks of other parts, because threads
// are seldom equally fast. An item takes as long as writing `numbers` numbers.
template <typename Work>
void parallel_ranges(int64_t n, int64_t numbers, int64_t threads, const Work& work) {
  constexpr int64_t kMostParts = 256, kChunksPerPart = 8;
  const int64_t least = std::max<int64_t>(1, kNumbersPerThread / std::max<int64_t>(1, numbers));  // items of a part
  const int64_t parts = std::clamp<int64_t>(n / least, 1, std::min(threads, kMostParts));
  if (parts == 1) {
    if (n > 0) work(int64_t(0), n);
    return;
  }
  const int64_t chunk = std::max(least, n / (parts * kChunksPerPart));
  const auto start_of = [&](int64_t part) { return part * n / parts; };
  std::atomic<int64_t> next[kMostParts];
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
