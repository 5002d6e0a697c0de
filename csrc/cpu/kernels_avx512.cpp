// The kernels for x86-64-v4, and the first pass of the search for VNNI.
//
// For one or two queries the first pass reads the codes in vectors of 32 bytes (namespace narrow). On an AMD EPYC (Zen
// 4) two threads then read memory a fifth faster than in vectors of 64 bytes.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_X86
#define SIMPLEXFIX_EVEX 1  // vectors of 32 bytes use VNNI in the encoding of AVX-512
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define SIMPLEXFIX_VECTOR_BYTES 32
namespace simplexfix::cpu::avx512::narrow {
#include "vector.inc"

#include "codes.inc"
}  // namespace simplexfix::cpu::avx512::narrow
#undef SIMPLEXFIX_VECTOR_BYTES
#define SIMPLEXFIX_VECTOR_BYTES 64
namespace simplexfix::cpu::avx512 {
#include "instruction_set.inc"
}  // namespace simplexfix::cpu::avx512
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define SIMPLEXFIX_VNNI 1
#undef SIMPLEXFIX_VECTOR_BYTES
#define SIMPLEXFIX_VECTOR_BYTES 32
namespace simplexfix::cpu::avx512vnni::narrow {
#include "vector.inc"

#include "codes.inc"
}  // namespace simplexfix::cpu::avx512vnni::narrow
#undef SIMPLEXFIX_VECTOR_BYTES
#define SIMPLEXFIX_VECTOR_BYTES 64
namespace simplexfix::cpu::avx512vnni {
#include "first_pass.inc"
}  // namespace simplexfix::cpu::avx512vnni
#pragma GCC pop_options
#endif
