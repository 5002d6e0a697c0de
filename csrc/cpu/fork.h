// Support for fork().  The child has all memory of its parent but only the thread that forked: a lock that another
// thread held is never released there, and data that it was changing stay half changed.
#pragma once
#include <mutex>

namespace simplexfix::cpu {

// fork() blocks while this mutex is held, so that no child finds half-changed data that it guards.  Hold it briefly.
std::mutex& fork_mutex();

// Calls mend(object) in every forked child, before anything else runs there.  Declare it as the last member of its
// owner, so that it never runs on an owner that is partly constructed or destroyed.
class ForkHook {
 public:
  using Mend = void (*)(void* object) noexcept;
  ForkHook(Mend mend, void* object);
  ForkHook(const ForkHook&) = delete;
  ForkHook& operator=(const ForkHook&) = delete;
  ~ForkHook();

 private:
  friend struct ForkHandlers;
  const Mend mend_;
  void* const object_;
  ForkHook *previous_ = nullptr, *next_ = nullptr;
};

}  // namespace simplexfix::cpu
