// An exact cosine index: normalised rows in fp32 or bf16 with an int64 id each, and their codes for the first
// pass of the search.  Free of torch and of Python.
//
// Any number of threads may call anything: searches and savings run beside each other, changes alone.
// A change happens as a whole or, if it throws, not at all.  What callers pass is trusted in shape only.
#pragma once
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <shared_mutex>
#include <string>

#include "gallery_codes.h"
#include "row_blocks.h"
#include "row_ids.h"

namespace simplexfix::cpu {

class CosineIndex {
 public:
  // d >= 1, threads >= 1: what a call may use.
  CosineIndex(int64_t d, RowType type, int64_t threads);

  int64_t dim() const { return d_; }
  RowType type() const { return type_; }
  int64_t threads() const { return threads_; }
  int64_t size() const;
  size_t bytes() const;  // all memory that grows with the rows

  // vectors [n, d]; ids [n], or nullptr: counted on from the highest ever given.
  // std::invalid_argument: a row that is not finite; an id that is negative, there already or given twice.
  void add(const float* vectors, int64_t n, const int64_t* ids);
  // std::out_of_range: an id that is not there; std::invalid_argument: one that is given twice.
  // Takes one pass over the rows behind the first removed.
  void remove(const int64_t* ids, int64_t n);
  // query [queries, d]; scores, found [queries, k], k >= 1.  std::invalid_argument: a query that is not finite.
  void search(const float* query, int64_t queries, int64_t k, float* scores, int64_t* found) const;

  // docs/formats.md.  std::system_error: what the operating system says; std::runtime_error: no such file's content.
  void save(const std::string& path) const;
  static std::unique_ptr<CosineIndex> load(const std::string& path, int64_t threads);

 private:
  int64_t threads_for(int64_t numbers) const;
  std::shared_lock<std::shared_mutex> reading() const;
  std::unique_lock<std::shared_mutex> writing() const;
  GalleryRows view(int64_t n) const { return rows_.view(n); }
  void write_rows(const float* vectors, int64_t first, int64_t n);
  std::optional<GalleryCodes> recentred(int64_t n) const;
  void encode(GalleryCodes& codes, int64_t begin, int64_t end) const;

  const int64_t d_;
  const RowType type_;
  const int64_t threads_;
  // Whoever wants mutex_ waits at the gate, first come first served: on its own a shared_mutex lets readers pass
  // a waiting writer for ever.
  mutable std::mutex gate_;
  mutable std::shared_mutex mutex_;
  RowBlocks rows_;
  RowIds ids_;
  std::optional<GalleryCodes> codes_;  // none where there are no rows, or d is too large for them
  int64_t centred_at_ = 0;             // rows that there were when the codes' center was chosen
};

}  // namespace simplexfix::cpu
