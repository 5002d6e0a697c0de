// The first pass of the cosine search on aarch64 (gallery_codes.h), for two extensions: dotprod has dot products of
// four int8 numbers (sdot), and i8mm also has products of small int8 matrices (usmmla, usdot). The base level compiles
// all other kernels, because it has all the instructions that they use.
#include "instruction_set.h"

#ifdef SIMPLEXFIX_ARM
#define SIMPLEXFIX_VECTOR_BYTES 16
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define SIMPLEXFIX_DOTPROD 1
namespace simplexfix::cpu::dotprod {
#include "first_pass.inc"
}  // namespace simplexfix::cpu::dotprod
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod+i8mm")
#define SIMPLEXFIX_I8MM 1
namespace simplexfix::cpu::i8mm {
#include "first_pass.inc"
}  // namespace simplexfix::cpu::i8mm
#pragma GCC pop_options
#endif
