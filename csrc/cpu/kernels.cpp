// Chooses the instruction-set level.
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "levels.h"

#if defined(SIMPLEXFIX_ARM) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#ifndef HWCAP2_I8MM  // in the kernel's headers since Linux 5.10
#define HWCAP2_I8MM (1 << 13)
#endif
#endif

namespace simplexfix::cpu {
namespace {
struct NamedLevel {
  const char* name;
  const Level* kernels;
  bool supported;  // by this machine
};

// All levels of this build, from the lowest. A machine may lack a level between two that it supports: many CPUs with
// AVX-512 have no AVX-VNNI.
std::vector<NamedLevel> list_levels() {
  std::vector<NamedLevel> levels = {{"base", &base::kLevel, true}};
#if defined(SIMPLEXFIX_X86)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("x86-64-v3") != 0;
  const bool v4 = v3 && __builtin_cpu_supports("x86-64-v4") != 0;
  const bool vnni512 = v4 && __builtin_cpu_supports("avx512vnni") != 0;
#ifdef SIMPLEXFIX_AVXVNNI_AS_EVEX
  const bool vnni256 = vnni512;
#else
  const bool vnni256 = v3 && __builtin_cpu_supports("avxvnni") != 0;
#endif
  levels.push_back({"avx2", &avx2::kLevel, v3});
  levels.push_back({"avxvnni", &avxvnni::kLevel, vnni256});
  levels.push_back({"avx512", &avx512::kLevel, v4});
  levels.push_back({"avx512vnni", &avx512vnni::kLevel, vnni512});
  levels.push_back({"avx512bf16", &avx512bf16::kLevel, vnni512 && __builtin_cpu_supports("avx512bf16") != 0});
#elif defined(SIMPLEXFIX_ARM) && defined(__linux__)
  const bool dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  levels.push_back({"dotprod", &dotprod::kLevel, dot});
  levels.push_back({"i8mm", &i8mm::kLevel, dot && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0});
#endif
  std::erase_if(levels, [](const NamedLevel& level) { return !level.kernels; });
  return levels;
}

struct Choice {
  std::vector<const char*> names;
  const char* name = nullptr;
  Level losses;  // kernels of losses, logits and contrast; `search` has the others
  SearchKernels search{};
};

template <typename T>
void replace(const T*& kernels, const T* newer) {
  if (newer) kernels = newer;
}

Choice choose() {
  Choice chosen;
  const char* cap = std::getenv("SIMPLEXFIX_ISA");  // only lowers the level, for tests and timings
  bool higher = true;
  for (const NamedLevel& level : list_levels()) {
    chosen.names.push_back(level.name);
    if (!higher) continue;
    higher = !cap || std::strcmp(cap, level.name) != 0;
    if (chosen.name && !level.supported) continue;  // a build without base has to run its lowest level
    chosen.name = level.name;
    replace(chosen.losses.of_float, level.kernels->of_float);
    replace(chosen.losses.of_double, level.kernels->of_double);
    replace(chosen.losses.of_half, level.kernels->of_half);
    replace(chosen.losses.of_bfloat16, level.kernels->of_bfloat16);
    if (const SearchKernels* search = level.kernels->search) chosen.search = *search;
    if (const FirstPass* first = level.kernels->first_pass) {
      chosen.search.scan_panel = first->scan_panel;
      chosen.search.limits = first->limits;
    }
  }
  return chosen;
}
const Choice g_choice = choose();
}  // namespace

const char* isa() { return g_choice.name; }
const std::vector<const char*>& isa_levels() { return g_choice.names; }

template <>
const Kernels<float>& kernels<float>() {
  return *g_choice.losses.of_float;
}
template <>
const Kernels<double>& kernels<double>() {
  return *g_choice.losses.of_double;
}
template <>
const Kernels<Half>& kernels<Half>() {
  return *g_choice.losses.of_half;
}
template <>
const Kernels<BFloat16>& kernels<BFloat16>() {
  return *g_choice.losses.of_bfloat16;
}
const SearchKernels& search_kernels() { return g_choice.search; }

}  // namespace simplexfix::cpu
