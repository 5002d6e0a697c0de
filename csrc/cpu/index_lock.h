// The lock of an index: readers beside each other, writers alone, first come first served.  Two things set it apart
// from a std::shared_mutex: whoever waits for it can be interrupted, and it survives a fork.
#pragma once
#include <condition_variable>
#include <cstdint>
#include <mutex>

#include "interrupt.h"

namespace simplexfix::cpu {

class IndexLock {
 public:
  enum class Access { kRead, kWrite };

  // Holds the lock as long as it lives.
  class Guard {
   public:
    Guard(IndexLock& lock, Access access, Interrupt& interrupt);
    Guard(const Guard&) = delete;
    Guard& operator=(const Guard&) = delete;
    ~Guard();

   private:
    friend class IndexLock;
    IndexLock& lock_;
    const Access access_;
    const Guard* const outer_;  // of the same thread: a signal's handler may call an index within a call of one
  };

  // In a forked child: frees the lock of all who held it in the parent.  Returns whether one of them was a writer: what
  // the lock guards is lost then, and every later Guard throws std::runtime_error.
  bool renew() noexcept;

 private:
  template <typename Condition>
  void wait(std::unique_lock<std::mutex>& lock, Interrupt& interrupt, Condition condition);

  static thread_local const Guard* t_innermost;

  std::mutex mutex_;  // of what follows
  std::condition_variable changed_;
  // Whoever wants the lock first takes the gate, and keeps it while waiting: readers would pass a waiting writer for
  // ever.
  bool gate_taken_ = false;
  bool writing_ = false;  // changes under fork_mutex() only: a child sees true where data may be half changed
  int64_t readers_ = 0;
  bool lost_ = false;
};

}  // namespace simplexfix::cpu
