#include "interrupt.h"

namespace simplexfix::cpu {
namespace {
constinit std::atomic<InterruptCheck> g_check{nullptr};
}  // namespace

void set_interrupt_check(InterruptCheck check) { g_check = check; }

void Interrupt::run_check() {
  const InterruptCheck wants_end = g_check;
  if (wants_end && wants_end()) stopped_ = true;
  next_ = Clock::now() + kInterval;  // counted from here: a signal handler may take long
}

}  // namespace simplexfix::cpu
