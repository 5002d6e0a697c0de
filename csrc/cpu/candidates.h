// The candidates of one query in a search: rows whose upper bound reached the cutoff and which are not scored yet.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <vector>

#include "select.h"

namespace simplexfix::cpu {

struct BoundedRow {
  float upper;   // upper bound of the score
  uint32_t row;  // index relative to the task's first row
};

class CandidateList {
 public:
  // Both are in ascending order of rows, except that pending has the sample's rows before the others.
  std::vector<BoundedRow> pending, best;

  void clear() {
    pending.clear();
    best.clear();
  }

  // Drops the pending rows that can no longer be among the best.
  void prune(float cutoff) {
    BoundedRow* const end =
        drop_if(pending.data(), pending.data() + pending.size(), [&](const BoundedRow& c) { return c.upper < cutoff; });
    pending.resize(size_t(end - pending.data()));
  }

  // Merges the sample's rows with the later ones, in ascending order.
  void sort_by_row() {
    const auto by_row = [](const BoundedRow& a, const BoundedRow& b) { return a.row < b.row; };
    const auto others = std::is_sorted_until(pending.begin(), pending.end(), by_row);
    std::inplace_merge(pending.begin(), others, pending.end(), by_row);
  }

  // Moves about k pending rows with the highest upper bounds to best, in the order of the rows. Any choice is correct,
  // but rows with high scores raise the cutoff most. For large k the k-th bound is estimated from every kStride-th
  // candidate or more; the rank is two standard deviations above the expected one. At most kMaxTaken * k rows are
  // moved, even if many bounds are equal. selection is scratch memory for the bounds.
  void take_best(int64_t k, std::vector<float>& selection) {
    constexpr size_t kStride = 4, kSampleSize = 64;
    constexpr int64_t kMaxTaken = 2;
    if (int64_t(pending.size()) <= k) {
      best.swap(pending);
      return;
    }
    const size_t stride = std::clamp<size_t>(size_t(k) / kSampleSize, 1, kStride);
    selection.clear();
    for (size_t i = 0; i < pending.size(); i += stride) selection.push_back(pending[i].upper);
    const size_t margin = stride == 1 ? 0 : size_t(2 * std::sqrt(double(k) / double(stride)));
    const size_t rank = std::min(selection.size() - 1, size_t(k - 1) / stride + margin);
    select_nth(selection.data(), int64_t(rank), selection.data() + selection.size(), std::greater<>());
    const float kth = selection[rank];
    best.resize(pending.size());
    BoundedRow* taken = best.data();
    BoundedRow* const most = taken + kMaxTaken * k;
    BoundedRow* const end = extract_if(pending.data(), pending.data() + pending.size(), taken,
                                       [&](const BoundedRow& c) { return int(c.upper >= kth) & int(taken < most); });
    pending.resize(size_t(end - pending.data()));
    best.resize(size_t(taken - best.data()));
  }
};

}  // namespace simplexfix::cpu
