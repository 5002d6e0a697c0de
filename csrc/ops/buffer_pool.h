// Reused memory for results on the CPU, above all gradients. torch's CPU allocator returns large blocks to the system,
// which hands them out again as zeroed pages. The page faults of a fresh 64 MiB take several times as long as computing
// a gradient of this size. A training step needs the same size every time.
#pragma once
#include "common.h"

namespace simplexfix {

// Returns an uninitialised contiguous CPU tensor, aligned to 64 bytes. Its memory returns to a pool when the tensor is
// freed. The pool keeps at most kMostBytes of free blocks.
Tensor reusable_empty(const std::vector<int64_t>& shape, ScalarType type);

constexpr size_t kMostBytes = size_t(256) << 20;

}  // namespace simplexfix
