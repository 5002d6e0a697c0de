// How a signal, Ctrl-C above all, ends a long call.  The core knows nothing of Python: module.cpp registers the check.
#pragma once
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>

namespace simplexfix::cpu {

// Thrown through a call that is to end; nothing has changed then.
struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted by a signal") {}
};

// Whether the call at hand is to end.  Called on the thread that made the call, a few times a second.
using InterruptCheck = bool (*)();
void set_interrupt_check(InterruptCheck check);

// One for each call, made by the thread that the caller is on.
class Interrupt {
 public:
  static constexpr std::chrono::milliseconds kInterval{100};

  // Throws Interrupted once the call is to end.  The maker's thread runs the check, at most once an interval; other
  // threads read what it said.
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
