// What a fork leaves in the child: all memory, and of the threads only the one that forked.  A lock that another thread
// held stays locked there for ever, and data that it was changing stay half changed.
#pragma once
#include <mutex>

namespace simplexfix::cpu {

// No fork happens while it is held: what changes under it is whole in every child.  For moments only.
std::mutex& fork_mutex();

// Whether this process was forked after the library was loaded.  OpenMP's threads, which torch computes on, may not
// exist here, and whoever hands them work hangs: work goes to threads of our own (parallel.h).
bool is_forked();

// Calls mend(object) in every forked child, before anything else runs there.  The last member of its owner, so that no
// child meets an owner half made or half destroyed.
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
