// The queries of a search in codes, and the cutoffs below which rows are left out. gallery_codes.h states and proves
// the bound.
#pragma once
#include <cstdint>
#include <vector>

#include "gallery_codes.h"

namespace simplexfix::cpu {

class QueryCodes {
 public:
  // query [n, d] must be normalised.
  QueryCodes(const float* query, int64_t n, const GalleryCodes& gallery);

  // Returns the kernel's argument, with one cutoff per query.
  CodeQueries view(const float* cutoff) const;

  // Returns the term of a row's upper bound that the kernel leaves out: |y - coded y| times the panel's largest
  // |coded x|. It is the same for all rows of a panel.
  float panel_term(int64_t q, float panel_norm) const { return residual_[size_t(q)] * panel_norm; }

  // Writes the cutoffs minus that term.
  void panel_cutoffs(const float* cutoff, float panel_norm, float* out) const;

  // Returns a cutoff: a row whose upper bound, panel_term included, is below it certainly scores below `score`.
  float cutoff(int64_t q, float score) const;

 private:
  int64_t d_, stride_, runs_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> start_, run_start_;
  std::vector<float> scale_, norm_, residual_;
  std::vector<double> center_dot_;  // query . center
};

}  // namespace simplexfix::cpu
