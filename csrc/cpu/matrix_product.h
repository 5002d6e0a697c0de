// Dense matrix products for the old/new contrast, of features in any format and of sums: the same bits on any number of
// threads.  (torch's stable ABI reaches only one of its matrix products, which takes a fifth longer here.)
//
// Both matrices are cut into chunks that are laid in panels of lines, each read by its tile from end to end
// (matrix_product.inc).  Memory: two chunks of kMost numbers.
#pragma once
#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "kernels.h"

namespace simplexfix::cpu {

// The rows of a left matrix, or the columns of a right one.
template <typename T>
struct Lines {
  const T* at;
  int64_t line, along;  // elements from one line to the next, and along a line; one of them is 1
};

template <typename A>
class MatrixProduct {
 public:
  // out [m, n] = or += the products of m lines of the left with n of the right, each k long; out's rows lie stride
  // apart.  split(count, numbers, work) calls work(begin, end) for parts of [0, count), on threads if it likes; each is
  // worth so many numbers.
  template <typename Left, typename Right, typename Split>
  void operator()(int64_t m, int64_t n, int64_t k, Lines<Left> left, Lines<Right> right, A* out, int64_t stride,
                  bool add, const Split& split) {
    const int64_t rows = kernels<A>().tile_rows, columns = kernels<A>().tile_columns;
    const int64_t most_k = std::min(k, kMostLength);
    const int64_t most_m = reserve(left_, m, rows, most_k), most_n = reserve(right_, n, columns, most_k);
    int64_t laid_i = -1, laid_l = -1;
    for (int64_t j = 0; j < n; j += most_n)
      for (int64_t l = 0; l < k; l += most_k) {
        const int64_t length = std::min(most_k, k - l), width = std::min(most_n, n - j);
        lay(right, j, l, width, length, columns, kernels<Right>().lay_right, right_, split);
        for (int64_t i = 0; i < m; i += most_m) {
          const int64_t height = std::min(most_m, m - i);
          if (laid_i != i || laid_l != l) lay(left, i, l, height, length, rows, kernels<Left>().lay_left, left_, split);
          laid_i = i, laid_l = l;
          multiply(height, width, length, out + i * stride + j, stride, add || l > 0, split);
        }
      }
  }

 private:
  static constexpr int64_t kMost = 640 * 1024;   // numbers of a chunk
  static constexpr int64_t kMostLength = 1024;   // of a panel: its tile's panels stay in L2
  static constexpr int64_t kPanelsTogether = 8;  // left panels that meet a right one while it is in L2

  struct Chunk {
    AlignedArray<A> numbers;
    int64_t size = 0;
  };
  Chunk left_, right_;

  // Room for as many of the lines, in panels of so many, as a chunk holds: their number.
  static int64_t reserve(Chunk& chunk, int64_t lines, int64_t panel, int64_t length) {
    const int64_t most = std::min(ceil_div(lines, panel), std::max<int64_t>(1, kMost / (panel * length))) * panel;
    if (chunk.size < most * length) {
      chunk.numbers = aligned_array<A>(size_t(most * length));
      chunk.size = most * length;
    }
    return most;
  }

  template <typename T, typename Lay, typename Split>
  static void lay(const Lines<T>& from, int64_t first, int64_t l, int64_t count, int64_t length, int64_t panel, Lay lay,
                  const Chunk& to, const Split& split) {
    split(ceil_div(count, panel), panel * length, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        lay(from.at + (first + p * panel) * from.line + l * from.along, from.line, from.along,
            std::min(panel, count - p * panel), length, to.numbers.get() + p * panel * length);
    });
  }

  template <typename Split>
  void multiply(int64_t m, int64_t n, int64_t length, A* out, int64_t stride, bool add, const Split& split) const {
    const int64_t rows = kernels<A>().tile_rows, columns = kernels<A>().tile_columns;
    const int64_t left_panels = ceil_div(m, rows), right_panels = ceil_div(n, columns);
    const int64_t groups = ceil_div(left_panels, kPanelsTogether);
    split(groups * right_panels, kPanelsTogether * rows * length, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item / right_panels * kPanelsTogether, q = item % right_panels;
        for (int64_t p = first; p < std::min(left_panels, first + kPanelsTogether); ++p)
          kernels<A>().multiply_tile(left_.numbers.get() + p * rows * length,
                                     right_.numbers.get() + q * columns * length, length,
                                     out + p * rows * stride + q * columns, stride, std::min(rows, m - p * rows),
                                     std::min(columns, n - q * columns), add);
      }
    });
  }
};

}  // namespace simplexfix::cpu
