// Compiles one source for several instruction sets, into one object file. Each copy has its own namespace, and the
// standard library's templates are declared above, outside the target regions. So no function that another file may
// share is compiled for a newer CPU. Per-file -m flags do not ensure that.
#include "kernels.h"

#include "aligned.h"

#include "../core/contrast.h"
#include "../core/cosine_score.h"
#include "../core/cube.h"
#include "../core/orthoplex.h"
#include "../core/simplex_cross_entropy.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <utility>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define SIMPLEXFIX_X86 1
#include <immintrin.h>
#endif

#define SIMPLEXFIX_INLINE static inline __attribute__((always_inline))

#define SIMPLEXFIX_VECTOR_BYTES 16
namespace simplexfix::cpu::base {
#include "instruction_set.inc"
}
#undef SIMPLEXFIX_VECTOR_BYTES

#ifdef SIMPLEXFIX_X86
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define SIMPLEXFIX_VECTOR_BYTES 32
namespace simplexfix::cpu::avx2 {
#include "instruction_set.inc"
}
#undef SIMPLEXFIX_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#define SIMPLEXFIX_VECTOR_BYTES 64
namespace simplexfix::cpu::avx512 {
#include "instruction_set.inc"
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,prefer-vector-width=512")
#define SIMPLEXFIX_VNNI 1
namespace simplexfix::cpu::avx512vnni {
#include "vector.inc"

#include "codes.inc"
inline constexpr SearchKernels kSearch{
    avx512::normalize_rows, {avx512::kSearch.dot[0], avx512::kSearch.dot[1]}, avx512::encode, scan_panel, kQueryRange};
}  // namespace simplexfix::cpu::avx512vnni
#undef SIMPLEXFIX_VNNI
#undef SIMPLEXFIX_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4,avx512vnni,avx512bf16,prefer-vector-width=512")
#define SIMPLEXFIX_VECTOR_BYTES 64
#define SIMPLEXFIX_AVX512BF16 1
namespace simplexfix::cpu::avx512bf16 {
#include "instruction_set.inc"
}
#undef SIMPLEXFIX_AVX512BF16
#undef SIMPLEXFIX_VECTOR_BYTES
#pragma GCC pop_options
#endif

namespace simplexfix::cpu {
namespace {
enum Isa { kBase, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };
const std::vector<const char*> kNames = {"base", "avx2", "avx512", "avx512vnni", "avx512bf16"};

Isa pick() {
  Isa best = kBase;
#ifdef SIMPLEXFIX_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v3")) best = kAvx2;
  if (__builtin_cpu_supports("x86-64-v4")) best = kAvx512;
  if (best == kAvx512 && __builtin_cpu_supports("avx512vnni")) best = kAvx512Vnni;
  if (best == kAvx512Vnni && __builtin_cpu_supports("avx512bf16")) best = kAvx512Bf16;
#endif
  if (const char* cap = std::getenv("SIMPLEXFIX_ISA"))  // only lowers it, for tests and timings
    for (int i = 0; i < best; ++i)
      if (!std::strcmp(cap, kNames[i])) return Isa(i);
  return best;
}
const Isa g_isa = pick();
}  // namespace

const char* isa() { return kNames[g_isa]; }
const std::vector<const char*>& isa_levels() { return kNames; }

template <typename T>
const Kernels<T>& kernels() {
#ifdef SIMPLEXFIX_X86
  if constexpr (std::is_same_v<T, BFloat16>)
    if (g_isa >= kAvx512Bf16) return avx512bf16::Table<T>::kernels;
  if (g_isa >= kAvx512) return avx512::Table<T>::kernels;
  if (g_isa == kAvx2) return avx2::Table<T>::kernels;
#endif
  return base::Table<T>::kernels;
}
template const Kernels<float>& kernels<float>();
template const Kernels<double>& kernels<double>();
template const Kernels<Half>& kernels<Half>();
template const Kernels<BFloat16>& kernels<BFloat16>();

const SearchKernels& search_kernels() {
#ifdef SIMPLEXFIX_X86
  if (g_isa >= kAvx512Vnni) return avx512vnni::kSearch;
  if (g_isa == kAvx512) return avx512::kSearch;
  if (g_isa == kAvx2) return avx2::kSearch;
#endif
  return base::kSearch;
}

}  // namespace simplexfix::cpu
