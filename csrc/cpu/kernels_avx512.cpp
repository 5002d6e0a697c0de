// The kernels for x86-64-v4, and the first pass of the search for VNNI.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_X86
#define SIMPLEXFIX_VECTOR_BYTES 64
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
namespace simplexfix::cpu::avx512 {
#include "instruction_set.inc"
}  // namespace simplexfix::cpu::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define SIMPLEXFIX_VNNI 1
namespace simplexfix::cpu::avx512vnni {
#include "first_pass.inc"
}  // namespace simplexfix::cpu::avx512vnni
#pragma GCC pop_options
#endif
