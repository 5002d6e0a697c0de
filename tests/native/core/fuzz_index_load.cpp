// Fuzzes CosineIndex::load with untrusted files. load() may reject a file with either of its two exceptions. An index
// that it returns must search correctly. Each input is tried as it is, and with corrected checksums.
//
// For libFuzzer: clang++ -std=c++20 -O1 -g -fsanitize=fuzzer,address,undefined -DSIMPLEXFIX_LIBFUZZER
//                csrc/cpu/*.cpp tests/native/core/fuzz_index_load.cpp -o fuzz && ./fuzz -max_len=8192 -rss_limit_mb=512
// Without libFuzzer, as run.py builds it: fuzz_index_load SECONDS [SEED] mutates files that it has written itself.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../../../csrc/cpu/checksum.h"
#include "../../../csrc/cpu/cosine_index.h"
#include "core.h"

using namespace simplexfix::cpu;

namespace {

// A file in memory that has a path.
class MemoryFile {
 public:
  MemoryFile() : fd_(::memfd_create("index", 0)) {}
  ~MemoryFile() { ::close(fd_); }
  void write(const uint8_t* data, size_t size) const {
    if (::ftruncate(fd_, 0) != 0 || ::pwrite(fd_, data, size, 0) != ssize_t(size)) std::abort();
  }
  std::string path() const { return "/proc/self/fd/" + std::to_string(fd_); }

 private:
  int fd_;
};

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}

// Checks an index that load() returned: a search with codes must find the same rows as one without.
void use(CosineIndex& index) {
  const int64_t n = index.size(), d = index.dim();
  if (d > 4096) return;
  std::vector<float> query(size_t(2 * d), 0.f);
  for (int64_t j = 0; j < d; ++j) query[size_t(j)] = float(j % 5) - 1.5f;
  Result best(2, 1), all(2, n + 1);
  index.search(query.data(), 2, 1, best.scores.data(), best.ids.data());
  index.search(query.data(), 2, n + 1, all.scores.data(), all.ids.data());  // k is too large for codes
  require(best == all.first(1), "the best row is another through the codes");
  require(all.ids[size_t(n)] == -1 && (n == 0 || all.ids[size_t(n - 1)] >= 0), "a row is missing");
  try {
    index.add(query.data(), 1, nullptr);
  } catch (const std::invalid_argument&) {  // no id left
  }
  for (int64_t i = 0; i < n; i += 2) index.remove(&all.ids[size_t(i)], 1);
  index.search(query.data(), 2, 1, best.scores.data(), best.ids.data());
}

int64_t g_taken = 0;

void try_file(const uint8_t* data, size_t size) {
  static const MemoryFile file;
  file.write(data, size);
  try {
    const auto index = CosineIndex::load(file.path(), 1);
    ++g_taken;
    use(*index);
  } catch (const std::runtime_error& error) {
    require(std::strlen(error.what()) > 0, "refused without a reason");
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try_file(data, size);
  if (size < 64) return 0;
  std::vector<uint8_t> forged(data, data + size);
  const auto put = [&](size_t at, const uint8_t* from, size_t count) {
    Crc32 checksum;
    checksum.add(from, count);
    const uint32_t value = checksum.value();
    std::memcpy(forged.data() + at, &value, 4);
  };
  std::memcpy(forged.data(), "SFXINDEX", 8);
  put(40, forged.data() + 64, size - 64);
  put(60, forged.data(), 60);
  try_file(forged.data(), size);
  return 0;
}

#ifndef SIMPLEXFIX_LIBFUZZER
namespace {

std::vector<uint8_t> example(RowType type, int64_t n, int64_t d, bool ids, Random& random) {
  CosineIndex index(d, type, 1);
  std::vector<int64_t> names(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) names[size_t(i)] = (i * 37) % 1009;
  index.add(clusters(n, d, 0.5, random).data(), n, ids ? names.data() : nullptr);
  const std::string path = "/tmp/simplexfix-fuzz-" + std::to_string(::getpid());
  index.save(path);
  std::FILE* file = std::fopen(path.c_str(), "rb");
  std::vector<uint8_t> bytes(1 << 16);
  bytes.resize(std::fread(bytes.data(), 1, bytes.size(), file));
  std::fclose(file);
  ::unlink(path.c_str());
  return bytes;
}

// Makes one small change to the file. Header fields and ids get numbers at or near the ends of their range.
void mutate(std::vector<uint8_t>& bytes, Random& random) {
  constexpr uint64_t kNumbers[] = {0,          1,          2,          63,         64,          65,         255,
                                   1ull << 31, 1ull << 32, 1ull << 40, 1ull << 62, ~0ull >> 1,  ~0ull,      ~0ull - 1,
                                   0x7f800000, 0x7fc00000, 0x3f800000, 0x7f7fffff, 0x80000000u, 0x00000001, 0xff80};
  constexpr size_t kFields[] = {8, 12, 16, 24, 32};
  const size_t at = bytes.empty() ? 0 : random() % bytes.size();
  switch (random() % 7) {
    case 0:
      if (!bytes.empty()) bytes[at] ^= uint8_t(1u << random() % 8);
      break;
    case 1: {
      const size_t field = kFields[random() % 5], width = field < 16 ? 4 : 8;
      const uint64_t number = kNumbers[random() % std::size(kNumbers)] + random() % 3 - 1;
      if (field + width <= bytes.size()) std::memcpy(bytes.data() + field, &number, width);
      break;
    }
    case 2: {
      const uint64_t number = kNumbers[random() % std::size(kNumbers)];
      const size_t width = size_t(2) << random() % 3;
      if (bytes.size() >= 72)
        std::memcpy(bytes.data() + 64 + (at % (bytes.size() - 71)) / width * width, &number, width);
      break;
    }
    case 3: bytes.resize(random() % 3 ? at : random() % 80); break;
    case 4: bytes.insert(bytes.begin() + long(at), random() % 64, uint8_t(random())); break;
    case 5:
      if (bytes.size() > 64)
        std::rotate(bytes.begin() + 64, bytes.begin() + 64 + long(at % (bytes.size() - 64)), bytes.end());
      break;
    default:  // fewer or more rows than the file has bytes for
      if (bytes.size() > 32) bytes[24 + random() % 2] = uint8_t(random());
  }
}

}  // namespace

int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 5;
  Random random(argc > 2 ? unsigned(std::atoi(argv[2])) : 1);
  std::vector<std::vector<uint8_t>> examples;
  for (const RowType type : {RowType::kFloat, RowType::kBFloat16})
    for (const bool ids : {false, true})
      for (const auto& [n, d] : {std::pair<int64_t, int64_t>{0, 3}, {1, 1}, {70, 9}, {5, 130}})
        examples.push_back(example(type, n, d, ids, random));
  for (const auto& whole : examples) try_file(whole.data(), whole.size());
  require(g_taken == int64_t(examples.size()), "a file of its own making is refused");
  const auto start = std::chrono::steady_clock::now();
  int64_t files = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    std::vector<uint8_t> bytes = examples[random() % examples.size()];
    for (unsigned changes = 1 + random() % 4; changes > 0; --changes) mutate(bytes, random);
    LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    ++files;
  }
  std::printf("OK: %ld files, of which, with forged checksums too, %ld were taken\n", long(files), long(g_taken));
}
#endif
