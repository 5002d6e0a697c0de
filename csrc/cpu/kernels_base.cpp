// The kernels for every CPU of the architecture: SSE2 on x86-64, Advanced SIMD on aarch64.
#include "instruction_set.h"

#define SIMPLEXFIX_VECTOR_BYTES 16
namespace simplexfix::cpu::base {
#include "instruction_set.inc"
}  // namespace simplexfix::cpu::base
