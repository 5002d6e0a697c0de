// The ids of the rows of an index, int64 and not negative.  What is stored depends on what they are:
//   0, 1, 2, ...     nothing
//   ascending        8 bytes a row; a row is found by bisection
//   in any order     a hash table beside them, about 40 bytes a row more
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
  const int64_t* data() const { return counted_ ? nullptr : ids_.data(); }  // nullptr: each row's place
  int64_t operator[](int64_t row) const { return counted_ ? row : ids_[size_t(row)]; }
  int64_t next() const { return next_; }
  void set_next(int64_t next) { next_ = next; }
  size_t bytes() const;

  // Appends n ids, or from next() on where ids is nullptr.  All or nothing: std::invalid_argument names an id
  // that is negative, there already, or given twice.
  void append(const int64_t* ids, int64_t n, Interrupt& interrupt);
  // The row of an id, or -1.
  int64_t find(int64_t id) const;
  // Rows of these ids, ascending: std::out_of_range names one that is not there, std::invalid_argument one that
  // is given twice.
  std::vector<int64_t> rows_of(const int64_t* ids, int64_t n, Interrupt& interrupt) const;
  // Allocates the memory that remove() needs; remove() itself cannot fail.
  void prepare_to_remove();
  void remove(const std::vector<int64_t>& rows);

 private:
  void check_new(const int64_t* ids, int64_t n, Interrupt& interrupt) const;
  void store(int64_t more);

  int64_t size_ = 0, next_ = 0;  // next: one above the highest id ever given
  bool counted_ = true, ascend_ = true;
  std::vector<int64_t> ids_;
  std::unordered_map<int64_t, int64_t> row_of_;  // in use unless they ascend
};

}  // namespace simplexfix::cpu
