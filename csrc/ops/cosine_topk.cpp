// simplexfix::cosine_topk: checks, allocation, normalisation, search.
#include <atomic>
#include <cstddef>
#include <optional>
#include <string>

#include "../cpu/float_mode.h"
#include "../cpu/interrupt.h"
#include "../cpu/parallel.h"
#include "../cpu/search.h"
#include "common.h"
#ifdef SIMPLEXFIX_WITH_CUDA
#include "../cuda/kernels.h"
#include "cuda_stream.h"
#endif

namespace simplexfix {
namespace {
// Encoding a gallery costs about as much as scoring it for half this number of queries.
constexpr int64_t kQueriesWorthCodes = 24;

constexpr int64_t kNumbersAtATime = int64_t(1) << 26;  // read and written between two checks of the interrupt

// Calls work(begin, end) over n rows of d numbers each by for_rows, and checks the interrupt between chunks.
template <typename Work>
void in_chunks(int64_t n, int64_t d, cpu::Interrupt& interrupt, const Work& work) {
  const int64_t chunk = std::max<int64_t>(1, kNumbersAtATime / std::max<int64_t>(1, d));
  for (int64_t first = 0; first < n; first += chunk) {
    interrupt.check();
    for_rows(std::min(chunk, n - first), d, [&](int64_t begin, int64_t end) { work(first + begin, first + end); });
  }
}

// Returns a dense, normalised copy of the rows. Throws if a row has nan or inf; the message names the first.
Tensor normalized(const Tensor& rows, const char* name, cpu::Interrupt& interrupt) {
  const int64_t n = rows.size(0), d = rows.size(1), stride = n > 1 ? rows.stride(0) : d;
  const float* in = data<float>(rows);
  std::atomic<int64_t> bad{n};
  in_chunks(n, d, interrupt, [&](int64_t begin, int64_t end) {
    const int64_t row = cpu::first_non_finite_row(in, stride, d, begin, end);
    if (row < 0) return;
    int64_t seen = bad.load();
    while (row < seen && !bad.compare_exchange_weak(seen, row)) {
    }
  });
  SIMPLEXFIX_CHECK(bad == n, name, " row ", bad.load(), " holds nan or inf");
  const Tensor out = torch::stable::new_empty(rows, {n, d});
  float* to = mutable_data<float>(out);
  in_chunks(n, d, interrupt, [&](int64_t begin, int64_t end) {
    const cpu::IeeeArithmetic ieee;
    cpu::search_kernels().normalize_rows(in, stride, to, d, begin, end);
  });
  return out;
}

void check(const Tensor& query, const Tensor& gallery, int64_t k) {
  for (const auto& [tensor, name] : {std::pair{&query, "query"}, std::pair{&gallery, "gallery"}}) {
    check_rows(*tensor, name);
    SIMPLEXFIX_CHECK(tensor->scalar_type() == ScalarType::Float, name, " must be float32, got ",
                     torch::headeronly::toString(tensor->scalar_type()));
  }
  SIMPLEXFIX_CHECK(query.size(1) == gallery.size(1), "query has ", query.size(1), " columns, gallery has ",
                   gallery.size(1));
  SIMPLEXFIX_CHECK(query.device() == gallery.device(), "query and gallery must be on the same device");
  SIMPLEXFIX_CHECK(k >= 1 && k < (int64_t(1) << 31), "k must lie between 1 and 2^31 - 1, got ", k);
}

std::tuple<Tensor, Tensor> cosine_topk_cpu(Tensor query, Tensor gallery, int64_t k) {
  check(query, gallery, k);
  cpu::Interrupt interrupt;
  const Tensor q = normalized(with_dense_rows(query), "query", interrupt);
  const Tensor g = normalized(with_dense_rows(gallery), "gallery", interrupt);
  const int64_t queries = q.size(0);
  const Tensor scores = torch::stable::new_empty(q, {queries, k});
  const Tensor ids = torch::stable::new_empty(q, {queries, k}, ScalarType::Long);
  const auto* rows_data = reinterpret_cast<const std::byte*>(data<float>(g));
  const cpu::GalleryRows rows{&rows_data, cpu::GalleryRows::kOneBlock, g.size(0), g.size(1)};
  std::optional<cpu::GalleryCodes> codes;
  if (queries >= kQueriesWorthCodes && cpu::Search::can_use_codes(rows.n, rows.d, k)) {
    codes.emplace(rows.d, cpu::central_row(rows));
    codes->resize(rows.n);
    const int64_t panels = ceil_div(rows.n, cpu::kPanelRows);
    in_chunks(panels, rows.d * cpu::kPanelRows, interrupt, [&](int64_t begin, int64_t end) {
      codes->encode(rows, begin * cpu::kPanelRows, std::min(rows.n, end * cpu::kPanelRows));
    });
  }
  const int64_t threads = cpu::Search::threads_for(queries, rows, torch::stable::get_num_threads());
  cpu::Search search(data<float>(q), queries, rows, codes ? &*codes : nullptr, k, threads, &interrupt);
  cpu::parallel(search.tasks(), threads, [&](int64_t task) { search.run(task); }, &interrupt);
  float* const to_scores = mutable_data<float>(scores);
  int64_t* const to_ids = mutable_data<int64_t>(ids);
  in_chunks(queries, k * 16, interrupt,
            [&](int64_t begin, int64_t end) { search.write(begin, end, to_scores, to_ids); });
  return {scores, ids};
}

#ifdef SIMPLEXFIX_WITH_CUDA
// Rows with nan or inf are not rejected here: the host would have to synchronize with the device
// (docs/design/numerics.md).
std::tuple<Tensor, Tensor> cosine_topk_cuda(Tensor query, Tensor gallery, int64_t k) {
  const torch::stable::accelerator::DeviceGuard guard(cuda_device(query, "query"));
  check(query, gallery, k);
  const Tensor q = with_dense_rows(query), g = with_dense_rows(gallery);
  const int64_t queries = q.size(0), n = g.size(0), d = q.size(1);
  const Tensor scores = torch::stable::new_empty(q, {queries, k});
  const Tensor ids = torch::stable::new_empty(q, {queries, k}, ScalarType::Long);
  cuda::CosineTopkArgs args{data<float>(q),
                            data<float>(g),
                            queries > 1 ? q.stride(0) : d,
                            n > 1 ? g.stride(0) : d,
                            queries,
                            n,
                            d,
                            k,
                            mutable_data<float>(scores),
                            mutable_data<int64_t>(ids),
                            cuda::plan_cosine_topk(queries, n, d, k),
                            {},
                            nullptr};
  constexpr int64_t kAlign = 256;
  int64_t offsets[cuda::kTopkBuffers], total = 0;
  for (int i = 0; i < cuda::kTopkBuffers; ++i) {
    offsets[i] = total;
    total += (args.plan.bytes[i] + kAlign - 1) / kAlign * kAlign;
  }
  const Tensor workspace = torch::stable::new_empty(q, {total}, ScalarType::Byte);
  for (int i = 0; i < cuda::kTopkBuffers; ++i)
    args.buffers[i] = args.plan.bytes[i] ? mutable_data<std::byte>(workspace) + offsets[i] : nullptr;
  const std::string name = "cosine_topk of [" + std::to_string(queries) + ", " + std::to_string(d) + "] in [" +
                           std::to_string(n) + ", " + std::to_string(d) + "] with k " + std::to_string(k);
  launch(query.get_device_index(), name.c_str(), [&](void* stream) {
    args.stream = stream;
    return cuda::cosine_topk(args);
  });
  return {scores, ids};
}
#endif

}  // namespace
}  // namespace simplexfix

STABLE_TORCH_LIBRARY_FRAGMENT(simplexfix, m) {
  m.def("cosine_topk(Tensor query, Tensor gallery, int k) -> (Tensor scores, Tensor ids)");
}
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CPU, m) { m.impl("cosine_topk", SIMPLEXFIX_OPERATOR(cosine_topk_cpu)); }
#ifdef SIMPLEXFIX_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(simplexfix, CUDA, m) { m.impl("cosine_topk", SIMPLEXFIX_OPERATOR(cosine_topk_cuda)); }
#endif
