// Dense matrix products for the old/new contrast. Inputs have any format, sums the accumulating type, and results the
// same bits on any number of threads. (The only product that torch's stable ABI exposes takes a fifth longer.)
//
// Blocking: A and B are split into chunks of at most kChunkNumbers numbers. A chunk is packed into panels, which a tile
// reads in order (matrix_product.inc). Memory: one chunk of A and one of B.
#pragma once
#include <algorithm>
#include <cstdint>

#include "aligned.h"
#include "kernels.h"

namespace simplexfix::cpu {

template <typename T>
class MatrixProduct {
 public:
  // out [m, n] = A [m, k] B [k, n], or += if add; rows of out are out_stride elements apart. split(count, numbers,
  // work) calls work(begin, end) on ranges that cover [0, count), on any threads. An item costs about `numbers`
  // operations.
  template <typename TA, typename TB, typename Split>
  void operator()(int64_t m, int64_t n, int64_t k, PanelView<TA> a, PanelView<TB> b, T* out, int64_t out_stride,
                  bool add, const Split& split) {
    const int64_t tile_rows = kernels<T>().tile_rows, tile_columns = kernels<T>().tile_columns;
    const int64_t max_k = std::min(k, kMaxDepth);
    const int64_t max_m = reserve(a_, m, tile_rows, max_k), max_n = reserve(b_, n, tile_columns, max_k);
    int64_t packed_i = -1, packed_l = -1;  // the chunk of A that a_ holds
    for (int64_t j = 0; j < n; j += max_n)
      for (int64_t l = 0; l < k; l += max_k) {
        const int64_t depth = std::min(max_k, k - l), width = std::min(max_n, n - j);
        pack(b.from(j, l), width, depth, tile_columns, kernels<TB>().pack_b, b_, split);
        for (int64_t i = 0; i < m; i += max_m) {
          const int64_t height = std::min(max_m, m - i);
          if (packed_i != i || packed_l != l)
            pack(a.from(i, l), height, depth, tile_rows, kernels<TA>().pack_a, a_, split);
          packed_i = i, packed_l = l;
          multiply(height, width, depth, out + i * out_stride + j, out_stride, add || l > 0, split);
        }
      }
  }

 private:
  static constexpr int64_t kChunkNumbers = 640 * 1024;
  static constexpr int64_t kMaxDepth = 1024;     // of a panel: one panel of A and one of B stay in L2
  static constexpr int64_t kPanelsTogether = 8;  // panels of A that one panel of B is multiplied with while it is in L2

  struct Chunk {
    AlignedArray<T> numbers;
    int64_t size = 0;
  };
  Chunk a_, b_;

  // Allocates a chunk for at most `count` rows of A or columns of B, in panels of `panel` each. Returns how many rows
  // or columns fit.
  static int64_t reserve(Chunk& chunk, int64_t count, int64_t panel, int64_t depth) {
    const int64_t most =
        std::min(ceil_div(count, panel), std::max<int64_t>(1, kChunkNumbers / (panel * depth))) * panel;
    if (chunk.size < most * depth) {
      chunk.numbers = aligned_array<T>(size_t(most * depth));
      chunk.size = most * depth;
    }
    return most;
  }

  template <typename TV, typename Pack, typename Split>
  static void pack(const PanelView<TV>& view, int64_t count, int64_t depth, int64_t panel, Pack pack_panel,
                   const Chunk& to, const Split& split) {
    split(ceil_div(count, panel), panel * depth, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p)
        pack_panel(view.from(p * panel, 0), std::min(panel, count - p * panel), depth,
                   to.numbers.get() + p * panel * depth);
    });
  }

  template <typename Split>
  void multiply(int64_t m, int64_t n, int64_t depth, T* out, int64_t out_stride, bool add, const Split& split) const {
    const int64_t tile_rows = kernels<T>().tile_rows, tile_columns = kernels<T>().tile_columns;
    const int64_t a_panels = ceil_div(m, tile_rows), b_panels = ceil_div(n, tile_columns);
    const int64_t groups = ceil_div(a_panels, kPanelsTogether);
    split(groups * b_panels, kPanelsTogether * tile_rows * depth, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t first = item / b_panels * kPanelsTogether, q = item % b_panels;
        for (int64_t p = first; p < std::min(a_panels, first + kPanelsTogether); ++p)
          kernels<T>().multiply_tile(
              a_.numbers.get() + p * tile_rows * depth, b_.numbers.get() + q * tile_columns * depth, depth,
              out + p * tile_rows * out_stride + q * tile_columns, out_stride, std::min(tile_rows, m - p * tile_rows),
              std::min(tile_columns, n - q * tile_columns), add);
      }
    });
  }
};

}  // namespace simplexfix::cpu
