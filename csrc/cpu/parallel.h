// Runs tasks on threads that it starts for the call. None of them outlives the call, so a fork is safe at any time.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "interrupt.h"

namespace simplexfix::cpu {

// Fewest numbers to write per thread: this takes about 50 us, as long as starting a thread.
constexpr int64_t kNumbersPerThread = int64_t(1) << 17;

// Returns the number of threads that are worth starting for the work, at most `most`.
inline int64_t threads_for(double numbers, double per_thread, int64_t most) {
  return int64_t(std::clamp(numbers / per_thread, 1.0, double(most)));
}

// Calls work(task) for the tasks [0, n) in any order, on at most `threads` threads, the caller included. After an
// exception no further task begins; the first one is rethrown when all threads have ended. interrupt belongs to the
// calling thread. It is checked before each task and while the caller waits for the others. Long tasks must check it
// themselves.
template <typename Work>
void parallel(int64_t n, int64_t threads, const Work& work, Interrupt* interrupt = nullptr) {
  std::atomic<int64_t> next{0};
  std::mutex mutex;  // guards the variables below
  std::condition_variable ended;
  std::exception_ptr failure;
  size_t running = 0;  // threads besides the caller
  const auto guarded = [&](const auto& body) {
    try {
      body();
    } catch (...) {
      next = n;
      const std::lock_guard lock(mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  const auto run = [&] {
    guarded([&] {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
        if (interrupt) interrupt->check();
        work(task);
      }
    });
  };
  const auto run_as_other = [&] {
    run();
    const std::lock_guard lock(mutex);
    --running;
    ended.notify_one();
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(n, threads); ++i) {
      {
        const std::lock_guard lock(mutex);
        ++running;
      }
      others.emplace_back(run_as_other);
    }
  } catch (const std::exception&) {  // no more threads, or no memory for them: the existing ones run all tasks
    const std::lock_guard lock(mutex);
    --running;
  }
  run();
  while (interrupt && !others.empty()) {
    {
      std::unique_lock lock(mutex);
      // Use the system clock: ThreadSanitizer does not intercept a wait on the steady clock.
      if (ended.wait_until(lock, std::chrono::system_clock::now() + Interrupt::kInterval, [&] { return running == 0; }))
        break;
    }
    guarded([&] { interrupt->check(); });
  }
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace simplexfix::cpu
