// Selects the first k of a range in some order, without branches that depend on the data. std::nth_element mispredicts
// about every other element.
#pragma once
#include <algorithm>
#include <cstdint>

namespace simplexfix::cpu {

// Same result as std::nth_element(first, first + nth, last, before).
template <typename T, typename Before>
void select_nth(T* first, int64_t nth, T* last, Before before) {
  constexpr int64_t kSmall = 32;
  // Each round splits the range at the median of three elements, whose random places make a bad split unlikely for any
  // order of the input. If many rounds don't shrink the range (equal elements), std::nth_element takes over.
  uint32_t random = 1;
  for (int round = 0; round < 24 && last - first > kSmall; ++round) {
    T* three[3];
    for (T*& p : three) {
      random = random * 1664525u + 1013904223u;
      p = first + int64_t(uint64_t(random) * uint64_t(last - first) >> 32);
    }
    if (before(*three[1], *three[0])) std::swap(three[0], three[1]);
    if (before(*three[2], *three[0])) std::swap(three[0], three[2]);
    if (before(*three[2], *three[1])) std::swap(three[1], three[2]);
    const T pivot = *three[1];
    std::swap(*three[1], last[-1]);
    T* split = first;
    for (T* p = first; p < last - 1; ++p) {
      const T element = *p;
      *p = *split;
      *split = element;
      split += before(element, pivot);
    }
    std::swap(*split, last[-1]);
    if (split - first == nth) return;
    if (split - first < nth) {
      nth -= split + 1 - first;
      first = split + 1;
    } else {
      last = split;
    }
  }
  std::nth_element(first, first + nth, last, before);
}

// Moves the elements that satisfy the predicate to out and closes the gaps, without changing the order. Returns the new
// end. out must have capacity for all elements.
template <typename T, typename Predicate>
T* extract_if(T* first, T* last, T*& out, Predicate predicate) {
  T* keep = first;
  for (T* p = first; p < last; ++p) {
    const T element = *p;
    const bool taken = predicate(element);
    *out = element;
    out += taken;
    *keep = element;
    keep += !taken;
  }
  return keep;
}

// Drops the elements that satisfy the predicate. Returns the new end.
template <typename T, typename Predicate>
T* drop_if(T* first, T* last, Predicate predicate) {
  T* keep = first;
  for (T* p = first; p < last; ++p) {
    const T element = *p;
    *keep = element;
    keep += !predicate(element);
  }
  return keep;
}

}  // namespace simplexfix::cpu
