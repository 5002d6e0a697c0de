#include "fork.h"

#include <pthread.h>

namespace simplexfix::cpu {
namespace {
// Constant-initialised and never destroyed: hooks may be constructed before, and destroyed after, the objects of any
// file.
constinit std::mutex g_mutex;
constinit ForkHook* g_first = nullptr;  // head of the list of hooks, guarded by g_mutex
}  // namespace

struct ForkHandlers {
  static void before() { g_mutex.lock(); }
  static void after_in_parent() { g_mutex.unlock(); }
  static void after_in_child() {
    for (const ForkHook* hook = g_first; hook; hook = hook->next_) hook->mend_(hook->object_);
    g_mutex.unlock();
  }
};

namespace {
[[maybe_unused]] const int g_registered =
    pthread_atfork(ForkHandlers::before, ForkHandlers::after_in_parent, ForkHandlers::after_in_child);
}  // namespace

std::mutex& fork_mutex() { return g_mutex; }

ForkHook::ForkHook(Mend mend, void* object) : mend_(mend), object_(object) {
  const std::lock_guard lock(g_mutex);
  next_ = g_first;
  if (next_) next_->previous_ = this;
  g_first = this;
}

ForkHook::~ForkHook() {
  const std::lock_guard lock(g_mutex);
  (previous_ ? previous_->next_ : g_first) = next_;
  if (next_) next_->previous_ = previous_;
}

}  // namespace simplexfix::cpu
