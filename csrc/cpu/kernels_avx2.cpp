// The kernels for x86-64-v3.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define SIMPLEXFIX_VECTOR_BYTES 32
namespace simplexfix::cpu::avx2 {
#include "instruction_set.inc"
}  // namespace simplexfix::cpu::avx2
#pragma GCC pop_options
#endif
