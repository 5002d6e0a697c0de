// An exact cosine index. It stores normalised rows in fp32 or bf16, an int64 id for each, and 8-bit codes of the rows
// for the first pass of a search (gallery_codes.h). It depends on neither torch nor Python.
//
// Any number of threads may call any method. Const methods run concurrently; add and remove exclude all other calls.
// These either complete or, if they throw, have no effect. Values of arguments are checked; shapes are not.
//
// Any call throws Interrupted if a signal ends it, and std::runtime_error in a child that was forked during a change.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "fork.h"
#include "gallery_codes.h"
#include "index_lock.h"
#include "row_blocks.h"
#include "row_ids.h"

namespace simplexfix::cpu {

// Restricts a search to the rows of these ids or, with exclude, to all other rows.
struct Selection {
  const int64_t* ids;
  int64_t n;
  bool exclude;
};

// Copies of rows, in fp32.
struct IndexRows {
  std::vector<int64_t> ids;
  std::vector<float> vectors;  // [ids, d]
};

class CosineIndex {
 public:
  // d >= 1. threads >= 1 is the maximum number of threads per call.
  CosineIndex(int64_t d, RowType type, int64_t threads);

  int64_t dim() const { return d_; }
  RowType type() const { return type_; }
  int64_t threads() const { return threads_; }
  int64_t size() const;
  size_t bytes() const;  // memory that grows with the number of rows

  bool contains(int64_t id) const;
  std::vector<int64_t> ids() const;  // in the order of the rows
  IndexRows rows() const;
  // Writes the vectors of ids to out [n, d]. Throws std::out_of_range for an id that is not in the index.
  void vectors(const int64_t* ids, int64_t n, float* out) const;

  // Adds vectors [n, d] under ids [n]. If ids is nullptr, new ids count up from one above the highest id ever used;
  // add() returns this first id in any case. Throws std::invalid_argument for a row that is not finite, and for an id
  // that is negative, in the index already, or given twice.
  int64_t add(const float* vectors, int64_t n, const int64_t* ids);
  // Removes rows, in one pass over the rows from the first removed one on. Throws std::out_of_range for an id that is
  // not in the index, std::invalid_argument for one that is given twice.
  void remove(const int64_t* ids, int64_t n);
  // Writes scores [queries, k] and ids found [queries, k] of the best k rows for query [queries, d]; k >= 1. If
  // fewer rows qualify, the rest get id -1 and score -inf. Throws std::invalid_argument for a query that is not finite,
  // std::out_of_range for an included id that is not in the index; excluded ids need not be in it.
  void search(const float* query, int64_t queries, int64_t k, float* scores, int64_t* found,
              const Selection* selection = nullptr) const;

  // docs/reference/formats.md defines the file. Throws std::system_error for errors of the operating system,
  // std::runtime_error for a file with invalid content.
  void save(const std::string& path) const;
  static std::unique_ptr<CosineIndex> load(const std::string& path, int64_t threads);

 private:
  int64_t threads_for(int64_t numbers) const;
  IndexLock::Guard reading(Interrupt& interrupt) const { return {lock_, IndexLock::Access::kRead, interrupt}; }
  IndexLock::Guard writing(Interrupt& interrupt) const { return {lock_, IndexLock::Access::kWrite, interrupt}; }
  GalleryRows view(int64_t n) const { return rows_.view(n); }
  void copy_row(int64_t row, float* out) const;
  std::vector<uint64_t> mask_of(const Selection& selection, Interrupt& interrupt) const;
  void write_rows(const float* vectors, int64_t first, int64_t n, Interrupt& interrupt);
  std::optional<GalleryCodes> encode_around_mean(int64_t n, Interrupt& interrupt) const;
  void encode(GalleryCodes& codes, int64_t begin, int64_t end, Interrupt* interrupt) const;
  void forget_if_half_changed() noexcept;

  const int64_t d_;
  const RowType type_;
  const int64_t threads_;
  mutable IndexLock lock_;
  RowBlocks rows_;
  RowIds ids_;
  std::optional<GalleryCodes> codes_;  // empty if there are no rows, or if d is too large for codes
  int64_t rows_when_centred_ = 0;      // the number of rows when the codes' centre was chosen
  const ForkHook hook_{[](void* self) noexcept { static_cast<CosineIndex*>(self)->forget_if_half_changed(); }, this};
};

}  // namespace simplexfix::cpu
