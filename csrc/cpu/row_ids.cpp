#include "row_ids.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace simplexfix::cpu {
namespace {
constexpr int64_t kLargest = std::numeric_limits<int64_t>::max();
constexpr int64_t kCheckEvery = 4096;  // ids between two checks of the interrupt

// Returns an element that occurs twice in a sorted vector, or nullptr.
const int64_t* repeated(const std::vector<int64_t>& sorted) {
  const auto at = std::adjacent_find(sorted.begin(), sorted.end());
  return at == sorted.end() ? nullptr : &*at;
}
}  // namespace

size_t RowIds::bytes() const {
  // The hash table has a node per row (the pair and a pointer, rounded up by malloc) and the buckets.
  return ids_.capacity() * sizeof(int64_t) + (ascend_ ? 0 : row_of_.size() * 32 + row_of_.bucket_count() * 8);
}

int64_t RowIds::find(int64_t id) const {
  if (implicit_) return id >= 0 && id < size_ ? id : -1;
  if (ascend_) {
    const auto at = std::lower_bound(ids_.begin(), ids_.end(), id);
    return at != ids_.end() && *at == id ? at - ids_.begin() : -1;
  }
  const auto at = row_of_.find(id);
  return at == row_of_.end() ? -1 : at->second;
}

void RowIds::check_new(const int64_t* ids, int64_t n, Interrupt& interrupt) const {
  for (int64_t i = 0; i < n; ++i) {
    if (i % kCheckEvery == 0) interrupt.check();
    if (ids[i] < 0 || ids[i] == kLargest)
      throw std::invalid_argument("ids must lie between 0 and 2^63 - 2, got " + std::to_string(ids[i]));
    if (ids[i] < next_ && find(ids[i]) >= 0)
      throw std::invalid_argument("id " + std::to_string(ids[i]) + " is in the index already");
  }
  if (std::adjacent_find(ids, ids + n, std::greater_equal<>()) == ids + n) return;
  std::vector<int64_t> sorted(ids, ids + n);
  std::sort(sorted.begin(), sorted.end());
  if (const int64_t* id = repeated(sorted))
    throw std::invalid_argument("id " + std::to_string(*id) + " is given twice");
}

// Stores the ids that were implicit, and reserves capacity for `more` new ones. Nothing else changes.
void RowIds::store(int64_t more) {
  const auto wanted = size_t(size_ + more);
  if (ids_.capacity() < wanted) ids_.reserve(implicit_ ? wanted : std::max(wanted, ids_.capacity() / 2 * 3));
  if (!implicit_) return;
  ids_.resize(size_t(size_));
  std::iota(ids_.begin(), ids_.end(), int64_t(0));
  implicit_ = false;
}

void RowIds::append(const int64_t* ids, int64_t n, Interrupt& interrupt) {
  if (n == 0) return;
  if (!ids && next_ > kLargest - n) throw std::invalid_argument("no ids are left above " + std::to_string(next_ - 1));
  if (ids) check_new(ids, n, interrupt);
  const auto id = [&](int64_t i) { return ids ? ids[i] : next_ + i; };
  bool count_on = implicit_;
  for (int64_t i = 0; count_on && i < n; ++i) count_on = id(i) == size_ + i;
  if (!count_on) {
    store(n);
    const bool ascend = ascend_ && (size_ == 0 || ids_.back() < id(0)) && (!ids || std::is_sorted(ids, ids + n));
    if (!ascend) {
      std::unordered_map<int64_t, int64_t> all;  // used if the table must be built first
      auto& rows = ascend_ ? all : row_of_;
      rows.reserve(size_t(size_ + n));
      int64_t inserted = 0;
      try {
        for (int64_t i = 0; ascend_ && i < size_; ++i) {
          if (i % kCheckEvery == 0) interrupt.check();
          rows.emplace(ids_[size_t(i)], i);
        }
        for (; inserted < n; ++inserted) {
          if (inserted % kCheckEvery == 0) interrupt.check();
          rows.emplace(id(inserted), size_ + inserted);
        }
      } catch (...) {
        for (int64_t i = 0; i < inserted; ++i) rows.erase(id(i));
        throw;
      }
      if (ascend_) row_of_.swap(all);
      ascend_ = false;
    }
    for (int64_t i = 0; i < n; ++i) ids_.push_back(id(i));  // within the reserved capacity
  }
  for (int64_t i = 0, first = next_; i < n; ++i) next_ = std::max(next_, (ids ? ids[i] : first + i) + 1);
  size_ += n;
}

std::vector<int64_t> RowIds::rows_of(const int64_t* ids, int64_t n, Interrupt& interrupt) const {
  std::vector<int64_t> rows;
  rows.reserve(size_t(n));
  for (int64_t i = 0; i < n; ++i) {
    if (i % kCheckEvery == 0) interrupt.check();
    const int64_t row = find(ids[i]);
    if (row < 0) throw std::out_of_range("id " + std::to_string(ids[i]) + " is not in the index");
    rows.push_back(row);
  }
  std::sort(rows.begin(), rows.end());
  if (const int64_t* row = repeated(rows))
    throw std::invalid_argument("id " + std::to_string((*this)[*row]) + " is given twice");
  return rows;
}

void RowIds::prepare_to_remove() { store(0); }

void RowIds::remove(const std::vector<int64_t>& rows) {
  if (rows.empty()) return;
  if (!ascend_)
    for (const int64_t row : rows) row_of_.erase(ids_[size_t(row)]);
  int64_t to = rows.front();
  size_t removed = 0;
  for (int64_t row = to; row < size_; ++row) {
    if (removed < rows.size() && rows[removed] == row) {
      ++removed;
      continue;
    }
    ids_[size_t(to)] = ids_[size_t(row)];
    if (!ascend_) row_of_.find(ids_[size_t(to)])->second = to;
    ++to;
  }
  ids_.resize(size_t(to));
  size_ = to;
}

}  // namespace simplexfix::cpu
