// The instruction-set levels: the files kernels_*.cpp define their kernels, and kernels.cpp chooses among them.
#pragma once
#include "kernels.h"

// Defined for gcc alone: levels above base use #pragma GCC target. Other compilers build only base.
#if defined(__GNUC__) && !defined(__clang__)
#if defined(__x86_64__)
#define SIMPLEXFIX_X86 1
#elif defined(__aarch64__)
#define SIMPLEXFIX_ARM 1
#endif
#endif

namespace simplexfix::cpu {

// The first pass of the search (SearchKernels).
struct FirstPass {
  decltype(SearchKernels::scan_panel) scan_panel;
  CodeLimits limits;
};

// The kernels that a level adds. Null: the level uses the kernels of the level below.
struct Level {
  const Kernels<float>* of_float = nullptr;
  const Kernels<double>* of_double = nullptr;
  const Kernels<Half>* of_half = nullptr;
  const Kernels<BFloat16>* of_bfloat16 = nullptr;
  const SearchKernels* search = nullptr;
  const FirstPass* first_pass = nullptr;  // replaces the first pass of `search`
};

// Weak, because a build for developers may leave levels out (SIMPLEXFIX_LEVELS in setup.py).
namespace base {
extern const Level kLevel __attribute__((weak));
}
namespace avx2 {
extern const Level kLevel __attribute__((weak));
}
namespace avxvnni {
extern const Level kLevel __attribute__((weak));
}
namespace avx512 {
extern const Level kLevel __attribute__((weak));
}
namespace avx512vnni {
extern const Level kLevel __attribute__((weak));
}
namespace avx512bf16 {
extern const Level kLevel __attribute__((weak));
}
namespace dotprod {
extern const Level kLevel __attribute__((weak));
}
namespace i8mm {
extern const Level kLevel __attribute__((weak));
}

}  // namespace simplexfix::cpu
