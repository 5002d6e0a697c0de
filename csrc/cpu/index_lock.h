// The reader-writer lock of an index: new readers cannot overtake a writer that waits for the present ones.  Unlike
// with std::shared_mutex, a signal can interrupt a blocked thread, and the lock works in a forked child.
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
    const Guard* const outer_;  // the enclosing guard of this thread: a signal handler may call an index during a call
  };

  // Releases, in a forked child, the locks that other threads held in the parent.  Returns whether one of them was a
  // writer: the guarded data is lost then, and every later Guard throws std::runtime_error.
  bool renew() noexcept;

 private:
  template <typename Condition>
  void wait(std::unique_lock<std::mutex>& lock, Interrupt& interrupt, Condition condition);

  static thread_local const Guard* t_innermost;

  std::mutex mutex_;  // guards the members below
  std::condition_variable changed_;
  // A thread takes the gate before it blocks on the lock and holds it meanwhile: otherwise readers starve a writer.
  bool gate_taken_ = false;
  bool writing_ = false;  // changes under fork_mutex() only: it is true in a child whose data may be half changed
  int64_t readers_ = 0;
  bool lost_ = false;
};

}  // namespace simplexfix::cpu
