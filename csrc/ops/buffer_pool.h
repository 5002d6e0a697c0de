// Memory for results on the CPU, above all gradients, that is used again.  torch's CPU allocator returns large blocks
// to the system, which hands them out again page by page, zeroed: touching a fresh 64 MiB costs several times as long
// as computing the gradient that it is for.  A training step wants the same size every time.
#pragma once
#include "common.h"

namespace simplexfix {

// An uninitialised CPU tensor, contiguous, aligned to 64 bytes.  Its memory comes from blocks that such
// tensors have left behind, of which the process keeps at most kMostBytes, and returns there.
Tensor reusable_empty(const std::vector<int64_t>& shape, ScalarType type);

constexpr size_t kMostBytes = size_t(256) << 20;

}  // namespace simplexfix
