#include "index_lock.h"

#include <memory>
#include <stdexcept>

#include "fork.h"

namespace simplexfix::cpu {

constinit thread_local const IndexLock::Guard* IndexLock::t_innermost = nullptr;

template <typename Condition>
void IndexLock::wait(std::unique_lock<std::mutex>& lock, Interrupt& interrupt, Condition condition) {
  while (!condition()) {
    // Use the system clock: ThreadSanitizer does not intercept a wait on the steady clock.
    changed_.wait_until(lock, std::chrono::system_clock::now() + Interrupt::kInterval);
    if (condition()) return;
    lock.unlock();  // a signal handler may run for long
    interrupt.check();
    lock.lock();
  }
}

IndexLock::Guard::Guard(IndexLock& lock, Access access, Interrupt& interrupt)
    : lock_(lock), access_(access), outer_(t_innermost) {
  bool reads_already = false;
  for (const Guard* held = outer_; held; held = held->outer_) {
    if (&held->lock_ != &lock) continue;
    if (access == Access::kWrite || held->access_ == Access::kWrite)
      throw std::runtime_error(
          "a signal handler used this index during the call that it interrupted, and one of the two "
          "calls changes the index: use the index after the handler");
    reads_already = true;
  }
  std::unique_lock own(lock.mutex_);
  if (lock.lost_)
    throw std::runtime_error(
        "another thread was changing this index when the process was forked, so the child cannot use it: load it from "
        "a "
        "file there, or fork while no thread adds or removes");
  if (!reads_already) {
    lock.wait(own, interrupt, [&] { return !lock.gate_taken_; });
    lock.gate_taken_ = true;
    try {
      lock.wait(own, interrupt, [&] { return !lock.writing_ && (access == Access::kRead || lock.readers_ == 0); });
    } catch (...) {
      if (!own.owns_lock()) own.lock();
      lock.gate_taken_ = false;
      lock.changed_.notify_all();
      throw;
    }
    lock.gate_taken_ = false;
    lock.changed_.notify_all();
  }
  if (access == Access::kRead) {
    ++lock.readers_;
  } else {
    const std::lock_guard no_fork(fork_mutex());
    lock.writing_ = true;
  }
  t_innermost = this;
}

IndexLock::Guard::~Guard() {
  t_innermost = outer_;
  const std::lock_guard own(lock_.mutex_);
  if (access_ == Access::kRead) {
    --lock_.readers_;
  } else {
    const std::lock_guard no_fork(fork_mutex());
    lock_.writing_ = false;
  }
  lock_.changed_.notify_all();
}

bool IndexLock::renew() noexcept {
  int64_t own_reads = 0;  // reads of this thread, which go on in the child: a signal handler forked during a call
  bool own_write = false;
  for (const Guard* held = t_innermost; held; held = held->outer_) {
    if (&held->lock_ != this) continue;
    if (held->access_ == Access::kRead)
      ++own_reads;
    else
      own_write = true;
  }
  lost_ = lost_ || (writing_ && !own_write);
  std::construct_at(&mutex_);
  std::construct_at(&changed_);
  gate_taken_ = false;
  writing_ = own_write;
  readers_ = own_reads;
  return lost_;
}

}  // namespace simplexfix::cpu
