// Ends a long call on a signal such as Ctrl-C.  The core does not depend on Python: module.cpp registers the check.
#pragma once
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace simplexfix::cpu {

// Thrown when a signal ends a call; the call has not changed the index.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// Returns whether to end the current call.  Runs on the thread that made the call, at most once per kInterval.
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);

// State of one call; construct it on the calling thread.
class Interrupt {
 public:
  static constexpr std::chrono::milliseconds kInterval{100};

  // Throws Interrupted once the registered InterruptCheck has returned true.  The calling thread runs that check, at
  // most once per kInterval; other threads read its result.
  void check() {
    if (stopped_.load(std::memory_order_relaxed)) throw Interrupted();
    if (std::this_thread::get_id() != maker_ || Clock::now() < next_) return;
    run_check();
    if (stopped_.load(std::memory_order_relaxed)) throw Interrupted();
  }

 private:
  using Clock = std::chrono::steady_clock;
  void run_check();

  const std::thread::id maker_ = std::this_thread::get_id();
  Clock::time_point next_ = Clock::now() + kInterval;
  std::atomic<bool> stopped_{false};
};

}  // namespace simplexfix::cpu
