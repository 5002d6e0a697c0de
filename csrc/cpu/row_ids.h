// The ids of an index's rows: int64, not negative. The ids determine what is stored:
//
//   0, 1, 2, ...     nothing
//   ascending        8 bytes per row; binary search finds a row
//   in any order     a hash table as well, about 40 bytes per row more
#pragma once
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "interrupt.h"

namespace simplexfix::cpu {

class RowIds {
 public:
  int64_t size() const { return size_; }
  const int64_t* data() const { return implicit_ ? nullptr : ids_.data(); }  // nullptr: a row's id is its index
  int64_t operator[](int64_t row) const { return implicit_ ? row : ids_[size_t(row)]; }
  int64_t next() const { return next_; }
  void set_next(int64_t next) { next_ = next; }
  size_t bytes() const;

  // Appends n ids, or next(), next() + 1, ... if ids is nullptr. Throws std::invalid_argument, which names an id that
  // is negative, stored already, or given twice. If it throws, nothing has changed.
  void append(const int64_t* ids, int64_t n, Interrupt& interrupt);
  // Returns the row of an id, or -1.
  int64_t find(int64_t id) const;
  // Returns the rows of these ids, ascending. Throws std::out_of_range, which names an id that is not stored, or
  // std::invalid_argument, which names one that is given twice.
  std::vector<int64_t> rows_of(const int64_t* ids, int64_t n, Interrupt& interrupt) const;
  // Allocates the memory that remove() needs; remove() itself cannot fail.
  void prepare_to_remove();
  void remove(const std::vector<int64_t>& rows);

 private:
  void check_new(const int64_t* ids, int64_t n, Interrupt& interrupt) const;
  void store(int64_t more);

  int64_t size_ = 0, next_ = 0;  // next_: one above the highest id ever stored
  bool implicit_ = true;         // whether the ids are 0, 1, 2, ... and ids_ is empty
  bool ascend_ = true;
  std::vector<int64_t> ids_;
  std::unordered_map<int64_t, int64_t> row_of_;  // in use unless the ids ascend
};

}  // namespace simplexfix::cpu
