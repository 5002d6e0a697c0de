// Headers of the files kernels_*.cpp, each of which compiles instruction_set.inc for one level, in a namespace and a
// target region of its own. The standard library's templates are declared here, outside the target regions. So no
// function that another file may share is compiled for a newer CPU. Per-file -m flags do not ensure that.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>

#include "../core/contrast.h"
#include "../core/cosine_score.h"
#include "../core/cube.h"
#include "../core/orthoplex.h"
#include "../core/simplex_cross_entropy.h"
#include "aligned.h"
#include "levels.h"

#if defined(__GNUC__) && !defined(__clang__)
#if defined(__x86_64__)
#define SIMPLEXFIX_X86 1
#include <immintrin.h>
#elif defined(__aarch64__)
#define SIMPLEXFIX_ARM 1
#include <arm_neon.h>
#endif
#endif

#define SIMPLEXFIX_INLINE static inline __attribute__((always_inline))
