// The kernels for x86-64-v3, and the first pass of the search for AVX-VNNI.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define SIMPLEXFIX_VECTOR_BYTES 32
namespace simplexfix::cpu::avx2 {
#include "instruction_set.inc"
}  // namespace simplexfix::cpu::avx2
#pragma GCC pop_options

#pragma GCC push_options
#ifdef SIMPLEXFIX_AVXVNNI_AS_EVEX  // for tests: the same instruction in the encoding of AVX-512
#pragma GCC target("arch=x86-64-v3,avx512vl,avx512vnni")
#define SIMPLEXFIX_EVEX 1
#else
#pragma GCC target("arch=x86-64-v3,avxvnni")
#endif
#define SIMPLEXFIX_VNNI 1
namespace simplexfix::cpu::avxvnni {
#include "first_pass.inc"
}  // namespace simplexfix::cpu::avxvnni
#pragma GCC pop_options
#endif
