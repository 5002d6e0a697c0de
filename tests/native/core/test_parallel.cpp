// Tests the pool of threads: each task runs once, a call does not wait for threads that have not begun, exceptions,
// interrupts, forks, signals, and the arithmetic of the threads.
#include "../../../csrc/cpu/parallel.h"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cfenv>
#include <chrono>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>

#include "core.h"

using namespace simplexfix::cpu;
using namespace std::chrono_literals;

namespace {

// Waits until the condition is true, for at most 10 seconds. Returns whether it is.
template <typename Condition>
bool soon(const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + 10s;
  while (!condition() && std::chrono::steady_clock::now() < end) std::this_thread::sleep_for(100us);
  return condition();
}

void test_each_task_runs_once(bool small) {
  const auto client = [&](int64_t n, int64_t threads, int64_t numbers, std::vector<int>& runs) {
    for (int repeat = 0; repeat < (small ? 20 : 200); ++repeat) {
      std::vector<std::atomic<int>> counts(static_cast<size_t>(n));
      parallel(n, threads, [&](int64_t task) { ++counts[size_t(task)]; });
      parallel_ranges(n, numbers, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) ++counts[size_t(i)];
      });
      for (size_t i = 0; i < counts.size(); ++i) runs[i] += counts[i];
    }
  };
  std::vector<std::vector<int>> runs;
  for (const int64_t n : {0, 1, 2, 7, 64, 1000}) runs.emplace_back(size_t(n));
  std::vector<std::thread> clients;  // they call at the same time, with different numbers of threads
  for (size_t i = 0; i < runs.size(); ++i)
    clients.emplace_back(
        [&, i] { client(int64_t(runs[i].size()), int64_t(1 + 2 * i), int64_t(10000 + 10000 * i), runs[i]); });
  for (std::thread& thread : clients) thread.join();
  for (const std::vector<int>& counts : runs)
    for (const int count : counts)
      check(count == (small ? 40 : 400), "a task of %zu ran %d times", counts.size(), count);
}

void test_threads_have_distinct_numbers() {
  std::mutex mutex;
  std::set<int64_t> numbers;
  const auto body = [&](int64_t thread) {
    {
      const std::lock_guard lock(mutex);
      check(numbers.insert(thread).second, "two threads have the number %ld", long(thread));
    }
    soon([&] {
      const std::lock_guard lock(mutex);
      return numbers.size() == 3;
    });
  };
  on_threads(3, 3, body);
  check(numbers.size() == 3 && *numbers.begin() == 0, "%zu of 3 threads came", numbers.size());
}

// While every thread of the pool is in another call, a call does all of its work itself and returns.
void test_no_wait_for_busy_threads() {
  std::atomic<int64_t> begun{0}, ended{0};
  std::atomic<bool> release{false};
  constexpr int64_t kThreads = 16;  // more than any test before has started
  std::thread other([&] {
    on_threads(kThreads, kThreads, [&](int64_t) {
      ++begun;
      soon([&] { return release.load(); });
      ++ended;
    });
  });
  check(soon([&] { return begun == kThreads; }), "%ld of %ld threads came", long(begun), long(kThreads));
  std::atomic<int64_t> done{0}, on_others{0};  // tasks
  parallel(100, 4, [&, caller = std::this_thread::get_id()](int64_t) {
    ++done;
    on_others += std::this_thread::get_id() != caller;
  });
  check(done == 100 && on_others == 0, "%ld tasks ran, %ld of them on other threads", long(done), long(on_others));
  check(ended == 0, "the call waited for threads that had not begun");
  release = true;
  other.join();
}

void test_errors() {
  for (const bool by_caller : {false, true}) {
    std::atomic<int64_t> begun{0}, ended{0};
    std::string said;
    try {
      on_threads(2, 2, [&](int64_t thread) {
        ++begun;
        soon([&] { return begun == 2; });
        if ((thread == 0) == by_caller) throw std::invalid_argument(by_caller ? "caller" : "other");
        std::this_thread::sleep_for(5ms);
        ++ended;
      });
    } catch (const std::invalid_argument& error) {
      said = error.what();
    }
    check(said == (by_caller ? "caller" : "other"), "caught '%s'", said.c_str());
    check(ended == 1, "the call returned before its other thread");
  }
  std::atomic<int64_t> tasks{0};
  try {
    parallel(1000000, 2, [&](int64_t) {
      ++tasks;
      throw std::runtime_error("task");
    });
    check(false, "no exception");
  } catch (const std::runtime_error&) {
  }
  check(tasks <= 2, "%ld tasks began after an exception", long(tasks));
}

// An interrupt ends the bodies of other threads, for which the caller waits; then the call throws.
void test_interrupt() {
  set_interrupt_check([] { return true; });
  Interrupt interrupt;
  std::atomic<bool> begun{false}, ended{false}, interrupted{false};
  const auto body = [&](int64_t thread) {
    if (thread == 0) {
      soon([&] { return begun.load(); });
      return;
    }
    begun = true;
    try {
      for (const auto end = std::chrono::steady_clock::now() + 20s; std::chrono::steady_clock::now() < end;
           std::this_thread::sleep_for(1ms))
        interrupt.check();
    } catch (const Interrupted&) {
      std::this_thread::sleep_for(5ms);
      ended = true;
      throw;
    }
  };
  try {
    on_threads(2, 2, body, &interrupt);
  } catch (const Interrupted&) {
    interrupted = true;
  }
  check(interrupted && ended, "the call was %sinterrupted, its thread has %sended", interrupted ? "" : "not ",
        ended ? "" : "not ");
  set_interrupt_check(nullptr);
}

// Returns the exit status of a child that runs the task, which returns whether it succeeded.
template <typename Task>
int in_child(const Task& task) {
  const pid_t pid = fork();
  if (pid == 0) {
    alarm(20);
    _exit(task() ? 0 : 1);
  }
  int status = -1;
  waitpid(pid, &status, 0);
  return status;
}

// Runs body(thread) on three threads at the same time, and returns whether all three ran.
template <typename Body>
bool on_three_threads(const Body& body) {
  std::atomic<int64_t> begun{0};
  on_threads(3, 3, [&](int64_t thread) {
    ++begun;
    soon([&] { return begun == 3; });
    body(thread);
  });
  return begun == 3;
}

// A program may change the arithmetic of its own threads at any time. A call computes in one mode, its caller's.
void test_arithmetic_is_the_callers() {
  const int before = std::fegetround();
  for (const int rounding : {FE_UPWARD, FE_DOWNWARD, before}) {
    std::atomic<int64_t> same{0};
    std::fesetround(rounding);
    on_three_threads([&](int64_t) { same += std::fegetround() == rounding; });
    std::fesetround(before);
    check(same == 3, "%ld of 3 threads round as the caller", long(same));
  }
}

// The application's threads handle signals such as SIGINT. A fault is handled on the thread that caused it.
void test_signals() {
  std::atomic<int64_t> right{0};
  on_three_threads([&](int64_t thread) {
    sigset_t blocked;
    pthread_sigmask(SIG_SETMASK, nullptr, &blocked);
    right += sigismember(&blocked, SIGINT) == (thread != 0) && !sigismember(&blocked, SIGSEGV) &&
             !sigismember(&blocked, SIGBUS);
  });
  check(right == 3, "%ld of 3 threads block the right signals", long(right));
}

// An exception of the interrupt check ends the call only after the bodies on other threads, which use the caller's
// stack, have ended.
void test_check_that_throws() {
  set_interrupt_check([]() -> bool { throw std::out_of_range("check"); });
  Interrupt interrupt;
  std::atomic<bool> begun{false}, ended{false};
  std::string said;
  try {
    on_threads(
        2, 2,
        [&](int64_t thread) {
          if (thread == 0) return void(soon([&] { return begun.load(); }));
          begun = true;
          std::this_thread::sleep_for(2 * Interrupt::kInterval);
          ended = true;
        },
        &interrupt);
  } catch (const std::out_of_range& error) {
    said = error.what();
  }
  check(said == "check", "caught '%s'", said.c_str());
  check(ended, "the call returned before its other thread");
  soon([&] { return ended.load(); });
  set_interrupt_check(nullptr);
}

// Called by fork() while it holds fork_mutex(): handlers run in the reverse order of their registration.
using Handler = void (*)();
constinit Handler g_at_fork = nullptr;
__attribute__((constructor(101))) void register_before_the_library() {
  const auto before = [] {
    if (g_at_fork) g_at_fork();
  };
  pthread_atfork(before, nullptr, nullptr);
}

bool works() {
  return on_three_threads([](int64_t) {});
}

// Must be the first test. Another thread makes the first call of the process while this one forks.
void test_fork_during_the_first_call() {
  static std::thread other;
  g_at_fork = [] {
    g_at_fork = nullptr;
    other = std::thread([] { works(); });
    std::this_thread::sleep_for(50ms);  // it reaches fork_mutex()
  };
  check(in_child(works) == 0, "a child forked during the first call cannot use the pool");
  other.join();
}

void test_forks() {
  check(works(), "the pool has not worked before the fork");
  check(in_child(works) == 0, "a child has no threads");
  check(in_child([&] { return works() && in_child(works) == 0; }) == 0, "a child of a child has no threads");
  check(works(), "the pool has not worked after the fork");

  // A signal handler that forks: the child continues a call whose other thread does not exist.
  static pid_t child;
  child = -1;
  set_interrupt_check([] {
    if (child < 0) child = fork();
    if (child == 0) alarm(20);
    return false;
  });
  Interrupt interrupt;
  std::atomic<bool> begun{false};
  bool failed = false;
  try {
    on_threads(
        2, 2,
        [&](int64_t thread) {
          if (thread != 0) begun = true;
          soon([&] { return thread == 0 ? begun.load() : child > 0; });
        },
        &interrupt);
  } catch (const std::runtime_error&) {
    failed = true;
  }
  if (child == 0) _exit(failed && works() ? 0 : 1);
  set_interrupt_check(nullptr);
  check(!failed, "a fork by a signal handler ended the parent's call");
  int status = -1;
  waitpid(child, &status, 0);
  check(status == 0, "a child of a signal handler ended with status %d", status);
}

}  // namespace

void test_parallel(const Options& options) {
#if !defined(__SANITIZE_THREAD__)  // TSan ends a child that starts threads
  test_fork_during_the_first_call();
  test_forks();
#endif
  test_each_task_runs_once(options.small);
  test_threads_have_distinct_numbers();
  test_no_wait_for_busy_threads();
  test_errors();
  test_interrupt();
  test_check_that_throws();
  test_arithmetic_is_the_callers();
  test_signals();
}
