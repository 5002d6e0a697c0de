// The kernels of bfloat16 for AVX512-BF16.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16,prefer-vector-width=512")
#define SIMPLEXFIX_VECTOR_BYTES 64
#define SIMPLEXFIX_AVX512BF16 1
namespace simplexfix::cpu::avx512bf16 {
#include "losses.inc"
constinit const Level kLevel{.of_bfloat16 = &kKernels<BFloat16>};
}  // namespace simplexfix::cpu::avx512bf16
#pragma GCC pop_options
#endif
