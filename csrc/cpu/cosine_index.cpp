#include "cosine_index.h"

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <vector>

#include "float_mode.h"
#include "parallel.h"
#include "search.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kPiece = 16 * kPanelRows;            // rows per task when rows are written
constexpr int64_t kResultsPerTask = int64_t(1) << 16;  // results that one task sorts, of at most 8 queries
// Below this number of rows the center is recomputed each time the rows have become four times as many. If rows are
// added one by one, a center computed from the first would be bad for all. These recomputations encode a row at most
// 4/3 times on average.
constexpr int64_t kEnoughToCentre = int64_t(1) << 16;

void refuse_non_finite(const char* what, const float* rows, int64_t n, int64_t d, Interrupt& interrupt) {
  const int64_t step = std::max<int64_t>(1, (int64_t(1) << 20) / d);
  for (int64_t begin = 0; begin < n; begin += step) {
    interrupt.check();
    const int64_t row = first_non_finite_row(rows, d, d, begin, std::min(n, begin + step));
    if (row >= 0) throw std::invalid_argument(std::string(what) + " row " + std::to_string(row) + " holds nan or inf");
  }
}

// Rounds finite numbers to nearest, ties to even.
void round_to_bfloat16(const float* from, std::byte* to, int64_t d) {
  for (int64_t j = 0; j < d; ++j) {
    uint32_t bits;
    std::memcpy(&bits, from + j, 4);
    const auto half = uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    std::memcpy(to + 2 * j, &half, 2);
  }
}
}  // namespace

CosineIndex::CosineIndex(int64_t d, RowType type, int64_t threads)
    : d_(d), type_(type), threads_(threads), rows_(d, type) {}

int64_t CosineIndex::size() const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  return ids_.size();
}

size_t CosineIndex::bytes() const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  return rows_.bytes() + ids_.bytes() + (codes_ ? codes_->bytes() : 0);
}

bool CosineIndex::contains(int64_t id) const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  return ids_.find(id) >= 0;
}

std::vector<int64_t> CosineIndex::ids() const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  std::vector<int64_t> ids(static_cast<size_t>(ids_.size()));
  for (int64_t i = 0; i < ids_.size(); ++i) ids[size_t(i)] = ids_[i];
  return ids;
}

IndexRows CosineIndex::rows() const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  const auto n = ids_.size();
  IndexRows rows{std::vector<int64_t>(size_t(n)), std::vector<float>(size_t(n * d_))};
  for (int64_t i = 0; i < n; ++i) {
    if (i % kPiece == 0) interrupt.check();
    rows.ids[size_t(i)] = ids_[i];
    copy_row(i, rows.vectors.data() + i * d_);
  }
  return rows;
}

void CosineIndex::vectors(const int64_t* ids, int64_t n, float* out) const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  for (int64_t i = 0; i < n; ++i) {
    if (i % kPiece == 0) interrupt.check();
    const int64_t row = ids_.find(ids[i]);
    if (row < 0) throw std::out_of_range("id " + std::to_string(ids[i]) + " is not in the index");
    copy_row(row, out + i * d_);
  }
}

void CosineIndex::copy_row(int64_t row, float* out) const {
  const float* from = view(ids_.size()).read(row, out);
  if (from != out) std::memcpy(out, from, size_t(d_) * sizeof(float));
}

int64_t CosineIndex::threads_for(int64_t numbers) const {
  return cpu::threads_for(double(numbers), double(kNumbersPerWokenThread), threads_);
}

int64_t CosineIndex::add(const float* vectors, int64_t n, const int64_t* ids) {
  Interrupt interrupt;
  refuse_non_finite("vectors", vectors, n, d_, interrupt);
  const auto lock = writing(interrupt);
  const int64_t before = ids_.size(), after = before + n, next = ids_.next();
  try {
    rows_.resize(after);
    write_rows(vectors, before, n, interrupt);
    if (d_ > GalleryCodes::kMaxDim || n == 0) {
      ids_.append(ids, n, interrupt);
    } else if (!codes_ || (rows_when_centred_ < kEnoughToCentre && after >= 4 * rows_when_centred_)) {
      std::optional<GalleryCodes> codes = encode_around_mean(after, interrupt);
      ids_.append(ids, n, interrupt);
      codes_ = std::move(codes);
      rows_when_centred_ = after;
    } else {
      codes_->resize(after);
      encode(*codes_, before, after, &interrupt);
      ids_.append(ids, n, interrupt);
    }
    return next;
  } catch (...) {
    rows_.resize(before);
    if (codes_) codes_->resize(before);
    throw;
  }
}

void CosineIndex::write_rows(const float* vectors, int64_t first, int64_t n, Interrupt& interrupt) {
  const auto write = [&](int64_t piece) {
    const IeeeArithmetic ieee;
    std::vector<float> unit(type_ == RowType::kFloat ? 0 : size_t(d_));
    for (int64_t i = piece * kPiece, end = std::min(n, i + kPiece); i < end; ++i) {
      std::byte* to = rows_.row(first + i);
      float* out = type_ == RowType::kFloat ? reinterpret_cast<float*>(to) : unit.data();
      search_kernels().normalize_rows(vectors + i * d_, d_, out, d_, 0, 1);
      if (type_ == RowType::kBFloat16) round_to_bfloat16(out, to, d_);
    }
  };
  parallel(ceil_div(n, kPiece), threads_for(n * d_), write, &interrupt);
}

std::optional<GalleryCodes> CosineIndex::encode_around_mean(int64_t n, Interrupt& interrupt) const {
  std::optional<GalleryCodes> codes;
  if (n == 0 || d_ > GalleryCodes::kMaxDim) return codes;
  codes.emplace(d_, central_row(view(n)));
  codes->resize(n);
  encode(*codes, 0, n, &interrupt);
  return codes;
}

void CosineIndex::encode(GalleryCodes& codes, int64_t begin, int64_t end, Interrupt* interrupt) const {
  const int64_t first = begin / kPiece;  // all pieces but the first begin at whole panels
  const auto encode = [&](int64_t piece) {
    const int64_t at = (first + piece) * kPiece;
    codes.encode(view(end), std::max(begin, at), std::min(end, at + kPiece));
  };
  parallel(ceil_div(end, kPiece) - first, threads_for((end - begin) * d_), encode, interrupt);
}

void CosineIndex::remove(const int64_t* ids, int64_t n) {
  Interrupt interrupt;
  const auto lock = writing(interrupt);
  const std::vector<int64_t> gone = ids_.rows_of(ids, n, interrupt);
  if (gone.empty()) return;
  ids_.prepare_to_remove();
  // From here on only the encoding can fail. Without codes searches are slower and return the same results.
  const auto bytes = size_t(row_bytes(type_, d_));
  int64_t to = gone.front();
  size_t passed = 0;
  for (int64_t row = to; row < ids_.size(); ++row) {
    if (passed < gone.size() && gone[passed] == row)
      ++passed;
    else
      std::memcpy(rows_.row(to++), rows_.row(row), bytes);
  }
  ids_.remove(gone);
  rows_.resize(to);
  if (!codes_) return;
  try {
    encode(*codes_, gone.front() / kPanelRows * kPanelRows, to, nullptr);
    codes_->resize(to);
  } catch (const std::bad_alloc&) {
    codes_.reset();
  }
  if (to == 0) codes_.reset();
}

std::vector<uint64_t> CosineIndex::mask_of(const Selection& selection, Interrupt& interrupt) const {
  const int64_t n = ids_.size();
  std::vector<uint64_t> mask(size_t(ceil_div(n, kPanelRows)), selection.exclude ? ~uint64_t(0) : 0);
  if (selection.exclude && n % kPanelRows != 0) mask.back() = (uint64_t(1) << (n % kPanelRows)) - 1;
  for (int64_t i = 0; i < selection.n; ++i) {
    if (i % kPiece == 0) interrupt.check();
    const int64_t row = ids_.find(selection.ids[i]);
    if (row < 0) {
      if (selection.exclude) continue;
      throw std::out_of_range("id " + std::to_string(selection.ids[i]) + " is not in the index");
    }
    const uint64_t bit = uint64_t(1) << (row % kPanelRows);
    uint64_t& word = mask[size_t(row / kPanelRows)];
    word = selection.exclude ? word & ~bit : word | bit;
  }
  return mask;
}

void CosineIndex::search(const float* query, int64_t queries, int64_t k, float* scores, int64_t* found,
                         const Selection* selection) const {
  Interrupt interrupt;
  refuse_non_finite("query", query, queries, d_, interrupt);
  std::vector<float> unit(size_t(queries * d_));
  {
    const IeeeArithmetic ieee;
    search_kernels().normalize_rows(query, d_, unit.data(), d_, 0, queries);
  }
  const auto lock = reading(interrupt);
  GalleryRows rows = view(ids_.size());
  rows.ids = ids_.data();
  std::vector<uint64_t> mask;
  if (selection) {
    mask = mask_of(*selection, interrupt);
    rows.mask = mask.data();
    rows.searched = 0;
    for (const uint64_t word : mask) rows.searched += std::popcount(word);
  }
  const int64_t threads = Search::threads_for(queries, rows, threads_);
  Search search(unit.data(), queries, rows, codes_ ? &*codes_ : nullptr, k, threads, &interrupt);
  parallel(search.tasks(), threads, [&](int64_t task) { search.run(task); }, &interrupt);
  const int64_t per_task = std::clamp<int64_t>(kResultsPerTask / k, 1, 8);
  const auto write = [&](int64_t task) {
    const int64_t begin = task * per_task;
    search.write(begin, std::min(queries, begin + per_task), scores, found);
  };
  parallel(ceil_div(queries, per_task), threads, write, &interrupt);
}

// Runs in a forked child. The old memory leaks: its containers may be inconsistent and must never be destroyed.
void CosineIndex::forget_if_half_changed() noexcept {
  if (!lock_.renew()) return;
  std::construct_at(&rows_, d_, type_);
  std::construct_at(&ids_);
  std::construct_at(&codes_);
}

}  // namespace simplexfix::cpu
