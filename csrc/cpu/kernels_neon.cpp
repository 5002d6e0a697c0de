// The first pass of the search on aarch64, by products of four numbers (dotprod: sdot) and by products of small
// matrices (i8mm: usmmla, usdot). All other kernels are those of the base level, which has all the instructions that
// they use.
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
