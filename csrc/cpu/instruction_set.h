// Headers of the files kernels_*.cpp, which compile the .inc files for each level in its own namespace and target
// region. The standard library's templates are declared here, outside the target regions. So no function that another
// file may share is compiled for a newer CPU. Per-file -m flags do not ensure that.
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

#if defined(SIMPLEXFIX_X86)
#include <immintrin.h>
#elif defined(SIMPLEXFIX_ARM)
#include <arm_neon.h>
#endif

#define SIMPLEXFIX_INLINE static inline __attribute__((always_inline))
