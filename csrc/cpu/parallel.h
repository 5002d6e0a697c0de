// Tasks on threads of their own, started for the call: nothing outlives it, so a fork is safe at any time.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace simplexfix::cpu {

// work(task) for the tasks [0, n), in any order, on at most so many threads, the caller among them.  The first
// exception is thrown again when all threads have ended; tasks not begun by then are left out.
template <typename Work>
void parallel(int64_t n, int64_t threads, const Work& work) {
  std::atomic<int64_t> next{0};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto run = [&] {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < n;) work(task);
    } catch (...) {
      next = n;
      const std::lock_guard lock(failure_mutex);
      if (!failure) failure = std::current_exception();
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(n, threads); ++i) others.emplace_back(run);
  } catch (const std::exception&) {  // no more threads or no memory for them: those there are do it all
  }
  run();
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace simplexfix::cpu
