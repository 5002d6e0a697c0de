// The queries of a search in codes, and how far down a row's upper bound may lie before the row is left out.
// The bound and its proof: gallery_codes.h.
#pragma once
#include <cstdint>
#include <vector>

#include "gallery_codes.h"

namespace simplexfix::cpu {

class QueryCodes {
 public:
  // Normalised queries [n, d].
  QueryCodes(const float* query, int64_t n, const GalleryCodes& gallery);

  // For the kernel, with a cutoff each.
  CodeQueries view(const float* cutoff) const;

  // The term of a row's upper bound that the kernel leaves out, the same for all rows of a panel:
  // |y - coded y| times the panel's largest |coded x|.
  float panel_term(int64_t q, float panel_norm) const { return residual_[size_t(q)] * panel_norm; }

  // The cutoffs without that term.
  void panel_cutoffs(const float* cutoff, float panel_norm, float* out) const;

  // A row whose upper bound, panel_term included, lies below this scores below `score` for certain.
  float cutoff(int64_t q, float score) const;

 private:
  int64_t d_, stride_;
  std::vector<int8_t> codes_;
  std::vector<int32_t> start_;
  std::vector<float> scale_, norm_, residual_;
  std::vector<double> center_dot_;  // query . center
};

}  // namespace simplexfix::cpu
