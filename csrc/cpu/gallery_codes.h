// A gallery in codes of eight bits, for the first pass of the exact search. Each row also has numbers that bound its
// score with any query.
//
// A row g is stored as x = g - center, coded as scale * codes with codes in [-127, 127]. center is a mean of rows, or
// zero if that mean is short. Embeddings often have a large mean; the codes of differences from it have smaller errors.
// For a query q with y = q - center, coded in the same way,
//
//   q.g = q.center + x.center + y.x,
//   |y.x - coded y . coded x| <= |y| |x - coded x| + |y - coded y| |coded x|      (Cauchy-Schwarz).
//
// Bytes: 1 per number and 12 per row, in panels of 64 rows; the last panel is padded. Large galleries use huge pages.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "gallery_rows.h"
#include "kernels.h"

namespace simplexfix::cpu {

class GalleryCodes {
 public:
  GalleryCodes(int64_t d, std::vector<float> center);

  // Above this the int32 sums could overflow, and the bounds would let every row pass anyway.
  static constexpr int64_t kMaxDim = int64_t(1) << 17;

  int64_t size() const { return size_; }
  int64_t dim() const { return d_; }
  int64_t groups() const { return groups_; }  // groups of four numbers per row
  size_t bytes() const;
  const float* center() const { return center_.data(); }

  // Allocates memory for n rows; new rows must then be encoded. If it throws, nothing has changed.
  void resize(int64_t n);
  // Encodes rows [begin, end) of the gallery. Each row must have length 1 or 0, up to rounding. Threads may encode
  // ranges in parallel if each begins at a multiple of kPanelRows.
  void encode(const GalleryRows& rows, int64_t begin, int64_t end);

  CodePanel panel(int64_t index) const;
  float panel_norm(int64_t index) const { return panel_norm_[size_t(index)]; }  // at least the largest |coded x|

 private:
  struct Free {
    void operator()(std::byte* p) const { std::free(p); }
  };
  // Memory of consecutive panels, from panel `first` on.
  struct Chunk {
    std::unique_ptr<std::byte[], Free> memory;
    size_t bytes, first;
  };
  void allocate(size_t panels);
  void free_from(size_t panel);

  int64_t d_, groups_, size_ = 0;
  size_t panel_bytes_, chunk_panels_, huge_bytes_, huge_panels_;  // sizes of a chunk with small and with huge pages
  std::vector<Chunk> chunks_;
  std::vector<std::byte*> panels_;  // address of each panel; there may be more than size_ rows need
  std::vector<float> panel_norm_, center_;
};

// Returns the mean of at most 1024 evenly spread rows, or zeros if it is too short to tighten the bounds.
std::vector<float> central_row(const GalleryRows& rows);

// Returns a float above x by at least 2^-20 |x|.
float round_up(double x);

}  // namespace simplexfix::cpu
