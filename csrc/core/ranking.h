// The order of search results on every device: higher score first, then lower id.
#pragma once
#include <cstdint>

#include "types.h"

namespace simplexfix {

struct Candidate {
  float score;
  int64_t id;
};

SIMPLEXFIX_HD bool ranks_before(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.id < b.id);
}

}  // namespace simplexfix
