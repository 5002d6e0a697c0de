// An exact cosine index: normalised rows in fp32 or bf16 with an int64 id each, and their codes for the first
// pass of the search.  Free of torch and of Python.
//
// Any number of threads may call anything: searches and savings run beside each other, changes alone.
// A change happens as a whole or, if it throws, not at all.  What callers pass is trusted in shape only.
// Any call throws Interrupted where a signal ends it, std::runtime_error in a child that was forked during a change.
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

// Which rows a search is of: those of these ids, or all others.
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
  // d >= 1, threads >= 1: what a call may use.
  CosineIndex(int64_t d, RowType type, int64_t threads);

  int64_t dim() const { return d_; }
  RowType type() const { return type_; }
  int64_t threads() const { return threads_; }
  int64_t size() const;
  size_t bytes() const;  // all memory that grows with the rows

  bool contains(int64_t id) const;
  std::vector<int64_t> ids() const;  // in the order of the rows
  IndexRows rows() const;
  // out [n, d].  std::out_of_range: an id that is not there.
  void vectors(const int64_t* ids, int64_t n, float* out) const;

  // vectors [n, d]; ids [n], or nullptr: counted on from the highest ever given.  Returns the first of those.
  // std::invalid_argument: a row that is not finite; an id that is negative, there already or given twice.
  int64_t add(const float* vectors, int64_t n, const int64_t* ids);
  // std::out_of_range: an id that is not there; std::invalid_argument: one that is given twice.
  // Takes one pass over the rows behind the first removed.
  void remove(const int64_t* ids, int64_t n);
  // query [queries, d]; scores, found [queries, k], k >= 1.  std::invalid_argument: a query that is not finite;
  // std::out_of_range: an id to search that is not there.
  void search(const float* query, int64_t queries, int64_t k, float* scores, int64_t* found,
              const Selection* selection = nullptr) const;

  // docs/formats.md.  std::system_error: what the operating system says; std::runtime_error: no such file's content.
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
  std::optional<GalleryCodes> recentred(int64_t n, Interrupt& interrupt) const;
  void encode(GalleryCodes& codes, int64_t begin, int64_t end, Interrupt* interrupt) const;
  void forget_if_half_changed() noexcept;

  const int64_t d_;
  const RowType type_;
  const int64_t threads_;
  mutable IndexLock lock_;
  RowBlocks rows_;
  RowIds ids_;
  std::optional<GalleryCodes> codes_;  // none where there are no rows, or d is too large for them
  int64_t centred_at_ = 0;             // rows that there were when the codes' center was chosen
  const ForkHook hook_{[](void* self) noexcept { static_cast<CosineIndex*>(self)->forget_if_half_changed(); }, this};
};

}  // namespace simplexfix::cpu
