#include "cosine_index.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <stdexcept>
#include <vector>

#include "float_mode.h"
#include "parallel.h"
#include "search.h"

namespace simplexfix::cpu {
namespace {
constexpr int64_t kPiece = 16 * kPanelRows;                 // rows to a task when rows are written
constexpr int64_t kNumbersPerThread = int64_t(1) << 22;     // of a search: about 50 us, what a thread costs to start
constexpr int64_t kRowNumbersPerThread = int64_t(1) << 17;  // of an addition
constexpr int64_t kQueriesPerTask = 8;                      // when results are sorted
// The center is chosen anew each time the rows have become four times as many, up to here: of rows that come one
// by one the first would do badly for all, and encoding a row 4/3 times on average costs little.
constexpr int64_t kEnoughToCentre = int64_t(1) << 16;

void refuse_non_finite(const char* what, const float* rows, int64_t n, int64_t d) {
  const int64_t row = first_non_finite_row(rows, d, d, 0, n);
  if (row >= 0) throw std::invalid_argument(std::string(what) + " row " + std::to_string(row) + " holds nan or inf");
}

// To nearest, ties to even; the numbers are finite.
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
  const auto lock = reading();
  return ids_.size();
}

size_t CosineIndex::bytes() const {
  const auto lock = reading();
  return rows_.bytes() + ids_.bytes() + (codes_ ? codes_->bytes() : 0);
}

std::shared_lock<std::shared_mutex> CosineIndex::reading() const {
  const std::lock_guard turn(gate_);
  return std::shared_lock(mutex_);
}

std::unique_lock<std::shared_mutex> CosineIndex::writing() const {
  const std::lock_guard turn(gate_);
  return std::unique_lock(mutex_);
}

int64_t CosineIndex::threads_for(int64_t numbers) const {
  return std::clamp<int64_t>(numbers / kRowNumbersPerThread, 1, threads_);
}

void CosineIndex::add(const float* vectors, int64_t n, const int64_t* ids) {
  refuse_non_finite("vectors", vectors, n, d_);
  const auto lock = writing();
  const int64_t before = ids_.size(), after = before + n;
  try {
    rows_.resize(after);
    write_rows(vectors, before, n);
    if (d_ > GalleryCodes::kMaxDim || n == 0) {
      ids_.append(ids, n);
    } else if (!codes_ || (centred_at_ < kEnoughToCentre && after >= 4 * centred_at_)) {
      std::optional<GalleryCodes> codes = recentred(after);
      ids_.append(ids, n);
      codes_ = std::move(codes);
      centred_at_ = after;
    } else {
      codes_->resize(after);
      encode(*codes_, before, after);
      ids_.append(ids, n);
    }
  } catch (...) {
    rows_.resize(before);
    if (codes_) codes_->resize(before);
    throw;
  }
}

void CosineIndex::write_rows(const float* vectors, int64_t first, int64_t n) {
  parallel(ceil_div(n, kPiece), threads_for(n * d_), [&](int64_t piece) {
    const IeeeArithmetic ieee;
    std::vector<float> unit(type_ == RowType::kFloat ? 0 : size_t(d_));
    for (int64_t i = piece * kPiece, end = std::min(n, i + kPiece); i < end; ++i) {
      std::byte* to = rows_.row(first + i);
      float* out = type_ == RowType::kFloat ? reinterpret_cast<float*>(to) : unit.data();
      search_kernels().normalize_rows(vectors + i * d_, d_, out, d_, 0, 1);
      if (type_ == RowType::kBFloat16) round_to_bfloat16(out, to, d_);
    }
  });
}

std::optional<GalleryCodes> CosineIndex::recentred(int64_t n) const {
  std::optional<GalleryCodes> codes;
  if (n == 0 || d_ > GalleryCodes::kMaxDim) return codes;
  codes.emplace(d_, central_row(view(n)));
  codes->resize(n);
  encode(*codes, 0, n);
  return codes;
}

void CosineIndex::encode(GalleryCodes& codes, int64_t begin, int64_t end) const {
  const int64_t first = begin / kPiece;  // pieces begin at whole panels, but for the first
  parallel(ceil_div(end, kPiece) - first, threads_for((end - begin) * d_), [&](int64_t piece) {
    const int64_t at = (first + piece) * kPiece;
    codes.encode(view(end), std::max(begin, at), std::min(end, at + kPiece));
  });
}

void CosineIndex::remove(const int64_t* ids, int64_t n) {
  const auto lock = writing();
  const std::vector<int64_t> gone = ids_.rows_of(ids, n);
  if (gone.empty()) return;
  ids_.prepare_to_remove();
  // from here on nothing fails but the encoding, without which searches are slower and the same
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
    encode(*codes_, gone.front() / kPanelRows * kPanelRows, to);
    codes_->resize(to);
  } catch (const std::bad_alloc&) {
    codes_.reset();
  }
  if (to == 0) codes_.reset();
}

void CosineIndex::search(const float* query, int64_t queries, int64_t k, float* scores, int64_t* found) const {
  refuse_non_finite("query", query, queries, d_);
  std::vector<float> unit(size_t(queries * d_));
  {
    const IeeeArithmetic ieee;
    search_kernels().normalize_rows(query, d_, unit.data(), d_, 0, queries);
  }
  const auto lock = reading();
  GalleryRows rows = view(ids_.size());
  rows.ids = ids_.data();
  const double numbers = double(queries) * double(rows.n) * double(d_);
  const auto threads = int64_t(std::clamp(numbers / double(kNumbersPerThread), 1.0, double(threads_)));
  Search search(unit.data(), queries, rows, codes_ ? &*codes_ : nullptr, k, threads);
  parallel(search.tasks(), threads, [&](int64_t task) { search.run(task); });
  parallel(ceil_div(queries, kQueriesPerTask), threads, [&](int64_t task) {
    const int64_t begin = task * kQueriesPerTask;
    search.write(begin, std::min(queries, begin + kQueriesPerTask), scores, found);
  });
}

}  // namespace simplexfix::cpu
