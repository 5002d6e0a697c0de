#include "parallel.h"

#include <fenv.h>
#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>

#include "fork.h"

namespace simplexfix::cpu {
namespace {

// One call of run_on_threads(), on the caller's stack. fork_mutex() guards all members that change; `running` becomes 0
// under it and may be read without it.
struct Call {
  void (*const body)(void*, int64_t);
  void* const context;
  const femode_t arithmetic;        // of the caller: rounding, and whether denormals are flushed
  int64_t to_wake;                  // threads of the pool that may still be woken
  int64_t seats = 0;                // how often threads of the pool may still begin the body
  std::atomic<int64_t> running{0};  // threads of the pool that are in the body
  std::exception_ptr failure = nullptr;
  Call *previous = nullptr, *next = nullptr;  // in the list of open calls, while seats > 0

  std::exception_ptr run(int64_t thread) const {
    try {
      body(context, thread);
    } catch (...) {
      return std::current_exception();
    }
    return nullptr;
  }
};

void cpu_pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until the condition is true, for at most 200 us, without sleeping. It yields the core to other threads and
// processes meanwhile.
template <typename Condition>
void spin_until(const Condition& condition) {
  constexpr std::chrono::microseconds kSpin{200};
  const auto end = std::chrono::steady_clock::now() + kSpin;
  for (;;) {
    for (int i = 0; i < 64; ++i) {
      if (condition()) return;
      cpu_pause();
    }
    if (std::chrono::steady_clock::now() > end) return;
    std::this_thread::yield();
  }
}

// The threads of this process, and the open calls: those that threads may still join. The pool is never destroyed,
// because its threads wait in it until the process exits. fork_mutex() guards all members, so a forked child finds them
// consistent. The child resets them, because the threads exist in the parent alone.
class Pool {
 public:
  void run(int64_t threads, Call& call, Interrupt* interrupt) {
    const int64_t forks = open(threads - 1, call);
    std::exception_ptr failure = call.run(0);
    std::unique_lock lock(fork_mutex());
    if (forks == forks_ && call.seats > 0) close(call);
    if (call.running != 0) {
      lock.unlock();
      spin_until([&] { return call.running.load(std::memory_order_relaxed) == 0; });
      lock.lock();
    }
    while (call.running != 0) {
      if (forks != forks_)
        throw std::runtime_error("a signal handler forked this process during the call: repeat the call in the child");
      // Use the system clock: ThreadSanitizer does not intercept a wait on the steady clock.
      ended_.wait_until(lock, std::chrono::system_clock::now() + Interrupt::kInterval);
      if (!interrupt || failure) continue;
      lock.unlock();
      try {
        interrupt->check();
      } catch (...) {  // keep every exception until the end: other threads still use this stack
        failure = std::current_exception();
      }
      lock.lock();
    }
    if (!failure) failure = std::move(call.failure);
    lock.unlock();
    if (failure) std::rethrow_exception(failure);
  }

 private:
  // Adds the call to the open calls and wakes threads for it. Returns forks_ of that moment.
  int64_t open(int64_t seats, Call& call) {
    std::unique_lock lock(fork_mutex());
    while (threads_ < seats && start_thread()) {
    }
    const int64_t forks = forks_;
    call.seats = std::min(seats, threads_);
    if (call.seats == 0) return forks;
    call.next = first_;
    if (first_) first_->previous = &call;
    first_ = &call;
    any_open_.store(true, std::memory_order_relaxed);
    wake_for(call, lock);
    return forks;
  }

  // Removes the call from the open calls: no further thread joins it.
  void close(Call& call) {
    (call.previous ? call.previous->next : first_) = call.next;
    if (call.next) call.next->previous = call.previous;
    any_open_.store(first_ != nullptr, std::memory_order_relaxed);
  }

  // Unlocks, and wakes up to two threads for the call. Each of them wakes two more, which spares the caller the time.
  void wake_for(Call& call, std::unique_lock<std::mutex>& lock) {
    const int64_t woken = std::min<int64_t>({2, call.to_wake, call.seats, waiting_});
    call.to_wake -= woken;
    lock.unlock();
    for (int64_t i = 0; i < woken; ++i) opened_.notify_one();
  }

  // Returns whether a thread was started. The thread blocks signals, so that threads of the application handle them. It
  // does not block faults: a blocked fault ends the process without calling its handler, such as Python's faulthandler.
  bool start_thread() {
    sigset_t blocked, before;
    sigfillset(&blocked);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) sigdelset(&blocked, fault);
    pthread_sigmask(SIG_SETMASK, &blocked, &before);
    bool started = true;
    try {
      std::thread([this, thread = threads_ + 1] { serve(thread); }).detach();
      ++threads_;
    } catch (const std::exception&) {  // the system has no thread or no memory left: the others do the work
      started = false;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return started;
  }

  void serve(int64_t thread) {
    for (;;) {
      spin_until([&] { return any_open_.load(std::memory_order_relaxed); });
      std::unique_lock lock(fork_mutex());
      ++waiting_;
      opened_.wait(lock, [&] { return first_ != nullptr; });
      --waiting_;
      Call& call = *first_;
      ++call.running;
      if (--call.seats == 0) close(call);
      wake_for(call, lock);
      fesetmode(&call.arithmetic);  // until now the thread has the mode of an earlier caller
      std::exception_ptr failure = call.run(thread);
      lock.lock();
      if (!call.failure) call.failure = failure;
      failure = nullptr;  // under the lock: once it is released, the caller may read and destroy the exception
      if (--call.running == 0) ended_.notify_all();
    }
  }

  // Runs in a forked child.
  void forget_threads() noexcept {
    first_ = nullptr;
    any_open_ = false;
    threads_ = waiting_ = 0;
    ++forks_;
    // Replace the old ones, which count waiting threads that do not exist here.
    std::construct_at(&opened_);
    std::construct_at(&ended_);
  }

  Call* first_ = nullptr;              // the open calls, the newest first
  std::atomic<bool> any_open_{false};  // whether first_ is set; may be read without the mutex
  int64_t threads_ = 0, waiting_ = 0;  // all threads, and those that wait for opened_
  int64_t forks_ = 0;                  // forks between the first process and this one
  std::condition_variable opened_, ended_;
  const ForkHook hook_{[](void* self) noexcept { static_cast<Pool*>(self)->forget_threads(); }, this};
};

// The pool is created when the library is loaded. A local static would be created by the first call, under a lock of
// the C++ runtime. A child that another thread forks during that call would block on the lock forever.
Pool& g_pool = *new Pool;

// Returns the calling thread's rounding mode and treatment of denormals. It takes 7 ns; fegetenv() takes 90.
femode_t arithmetic() {
  femode_t mode;
  fegetmode(&mode);
  return mode;
}

}  // namespace

void run_on_threads(int64_t threads, int64_t woken, void (*body)(void* context, int64_t thread), void* context,
                    Interrupt* interrupt) {
  if (threads <= 1) return body(context, 0);
  Call call{.body = body, .context = context, .arithmetic = arithmetic(), .to_wake = woken - 1};
  g_pool.run(threads, call, interrupt);
}

}  // namespace simplexfix::cpu
