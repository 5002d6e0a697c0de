// CosineIndex::save and load. docs/reference/formats.md defines the format.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "checksum.h"
#include "cosine_index.h"
#include "parallel.h"

static_assert(std::endian::native == std::endian::little,
              "the file is little-endian, and written as it lies in memory");

namespace simplexfix::cpu {
namespace {

constexpr char kMagic[8] = {'S', 'F', 'X', 'I', 'N', 'D', 'E', 'X'};
constexpr uint32_t kVersion = 1;
constexpr int64_t kMaxDim = (int64_t(1) << 31) - 2;
constexpr int64_t kMaxRows = int64_t(1) << 40;
constexpr int64_t kIdsPerBlock = 1 << 16;

struct Header {
  char magic[8];
  uint32_t version, row_type;
  int64_t dim, rows, next_id;
  uint32_t payload_checksum;
  uint32_t zero[4];
  uint32_t header_checksum;  // of all bytes before it
};
static_assert(sizeof(Header) == 64);

uint32_t checksum_of(const Header& header) {
  Crc32 checksum;
  checksum.add(&header, offsetof(Header, header_checksum));
  return checksum.value();
}

[[noreturn]] void fail_with_errno(const char* call) { throw std::system_error(errno, std::generic_category(), call); }
[[noreturn]] void reject(const std::string& why) { throw std::runtime_error(why); }

class File {
 public:
  File(const std::string& path, int flags, mode_t mode = 0666) : fd_(::open(path.c_str(), flags | O_CLOEXEC, mode)) {
    if (fd_ < 0) fail_with_errno("open");
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;
  ~File() {
    if (fd_ >= 0) ::close(fd_);
  }

  void write(const void* data, size_t size) {
    for (const char* p = static_cast<const char*>(data); size > 0;) {
      const ssize_t done = ::write(fd_, p, size);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail_with_errno("write");
      p += done;
      size -= size_t(done);
    }
  }
  void read(void* data, size_t size) {
    for (char* p = static_cast<char*>(data); size > 0;) {
      const ssize_t done = ::read(fd_, p, size);
      if (done < 0 && errno == EINTR) continue;
      if (done < 0) fail_with_errno("read");
      if (done == 0) reject("the file became shorter while it was read: load it again once it is written");
      p += done;
      size -= size_t(done);
    }
  }
  void write_at_start(const Header& header) {
    if (::lseek(fd_, 0, SEEK_SET) < 0) fail_with_errno("lseek");
    write(&header, sizeof header);
  }
  int64_t size() const {
    struct stat status;
    if (::fstat(fd_, &status) < 0) fail_with_errno("fstat");
    if (!S_ISREG(status.st_mode)) reject("it is not a regular file");
    return status.st_size;
  }
  void change_mode(mode_t mode) {
    if (::fchmod(fd_, mode) < 0) fail_with_errno("fchmod");
  }
  void sync() {
    if (::fsync(fd_) < 0) fail_with_errno("fsync");
  }
  void close() {
    if (::close(std::exchange(fd_, -1)) < 0) fail_with_errno("close");
  }

 private:
  int fd_;
};

// A temporary file beside `path`. commit() gives it the mode of the file at `path`, if there is one, and renames it to
// `path`. Without commit() it is deleted.
class Replacement {
 public:
  explicit Replacement(const std::string& path) : path_(path) {
    struct stat replaced;
    if (::stat(path.c_str(), &replaced) == 0) mode_ = replaced.st_mode & 0777;
    const size_t slash = path.rfind('/');
    if (slash != std::string::npos) folder_ = path.substr(0, slash + 1);
    while (!file) {  // a killed process with the same id may have left a file of this name
      // The name is short: `path` plus a suffix could exceed the limit of 255 bytes for a name.
      temporary_ = folder_ + ".simplexfix-" + std::to_string(::getpid()) + "-" + std::to_string(++g_counter) + ".tmp";
      try {
        file.emplace(temporary_, O_WRONLY | O_CREAT | O_EXCL, mode_.value_or(0666));
      } catch (const std::system_error& error) {
        if (error.code() != std::errc::file_exists) throw;
      }
    }
  }
  ~Replacement() {
    if (file) ::unlink(temporary_.c_str());
  }
  void commit() {
    if (mode_) file->change_mode(*mode_);  // restores the bits that the umask removed
    file->sync();
    file->close();
    if (::rename(temporary_.c_str(), path_.c_str()) < 0) fail_with_errno("rename");
    file.reset();
    File(folder_.empty() ? "." : folder_, O_RDONLY | O_DIRECTORY).sync();
  }

  std::optional<File> file;

 private:
  static inline std::atomic<int64_t> g_counter{0};
  std::string path_, folder_, temporary_;  // folder_: empty, or ends with a slash
  std::optional<mode_t> mode_;             // of the file that is replaced
};

Header read_header(File& file) {
  const int64_t size = file.size();
  Header header;
  if (size < int64_t(sizeof header)) reject("it is shorter than a header of 64 bytes");
  file.read(&header, sizeof header);
  if (std::memcmp(header.magic, kMagic, sizeof kMagic) != 0) reject("it does not begin with SFXINDEX");
  if (header.version != kVersion) reject("it is of version " + std::to_string(header.version) + ", expected 1");
  if (header.header_checksum != checksum_of(header))
    reject("the header's checksum does not match: the file is damaged");
  for (const uint32_t zero : header.zero)
    if (zero != 0) reject("a reserved field of the header is not 0");
  if (header.row_type > uint32_t(RowType::kBFloat16)) reject("its row type must be 0 (float32) or 1 (bfloat16)");
  if (header.dim < 1 || header.dim > kMaxDim) reject("its dim must lie in [1, 2^31 - 2]");
  if (header.rows < 0 || header.rows > kMaxRows || header.next_id < 0)
    reject("its number of rows or its next id is out of range");
  const int64_t row = 8 + row_bytes(RowType(header.row_type), header.dim);
  if (header.rows > (size - int64_t(sizeof header)) / row || size != int64_t(sizeof header) + header.rows * row)
    reject("it has " + std::to_string(size) + " bytes, which its header contradicts: it is truncated or damaged");
  return header;
}

// Checks that rows are as add() writes them: finite, and of length 0, or of length 1 up to rounding. The search bounds
// require this.
void check_rows(const GalleryRows& rows, int64_t begin, int64_t end) {
  const double tolerance = rows.type == RowType::kFloat ? 0x1p-20 : 0x1p-7;
  std::vector<float> scratch(size_t(rows.d));
  for (int64_t i = begin; i < end; ++i) {
    const float* row = rows.read(i, scratch.data());
    double square = 0;
    for (int64_t j = 0; j < rows.d; ++j) square += double(row[j]) * double(row[j]);
    if (square != 0 && !(std::abs(square - 1) <= tolerance))
      reject("row " + std::to_string(i) + " must have length 1 or 0");
  }
}

}  // namespace

void CosineIndex::save(const std::string& path) const {
  Interrupt interrupt;
  const auto lock = reading(interrupt);
  Replacement replacement(path);
  File& file = *replacement.file;
  Header header{{}, kVersion, uint32_t(type_), d_, ids_.size(), ids_.next(), 0, {}, 0};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  file.write(&header, sizeof header);
  Crc32 checksum;
  const auto write = [&](const void* data, size_t size) {
    interrupt.check();
    checksum.add(data, size);
    file.write(data, size);
  };
  std::vector<int64_t> block;
  for (int64_t i = 0; i < ids_.size();) {
    block.clear();
    for (; i < ids_.size() && int64_t(block.size()) < kIdsPerBlock; ++i) block.push_back(ids_[i]);
    write(block.data(), block.size() * sizeof(int64_t));
  }
  const GalleryRows rows = view(ids_.size());
  for (int64_t i = 0; i < rows.n; i += rows_.rows_per_block())
    write(rows.row(i), size_t(std::min(rows.n - i, rows_.rows_per_block()) * row_bytes(type_, d_)));
  header.payload_checksum = checksum.value();
  header.header_checksum = checksum_of(header);
  file.write_at_start(header);
  replacement.commit();
}

std::unique_ptr<CosineIndex> CosineIndex::load(const std::string& path, int64_t threads) {
  Interrupt interrupt;
  File file(path, O_RDONLY | O_NONBLOCK);  // O_NONBLOCK: opening a pipe must not block
  const Header header = read_header(file);
  const int64_t n = header.rows;
  const auto type = RowType(header.row_type);
  auto index = std::make_unique<CosineIndex>(header.dim, type, threads);
  Crc32 checksum;
  const auto read = [&](void* data, size_t size) {
    interrupt.check();
    file.read(data, size);
    checksum.add(data, size);
  };
  std::vector<int64_t> block;
  for (int64_t i = 0; i < n; i += int64_t(block.size())) {
    block.resize(size_t(std::min(n - i, kIdsPerBlock)));
    read(block.data(), block.size() * sizeof(int64_t));
    try {
      index->ids_.append(block.data(), int64_t(block.size()), interrupt);
    } catch (const std::invalid_argument& error) {
      reject(error.what());
    }
  }
  if (header.next_id < index->ids_.next()) reject("its next id must be above all of its ids");
  index->ids_.set_next(header.next_id);
  for (int64_t i = 0; i < n;) {  // block by block, so that a file that shrinks during the load fails early
    const int64_t end = std::min(n, i + index->rows_.rows_per_block());
    index->rows_.resize(end);
    read(index->rows_.row(i), size_t((end - i) * row_bytes(type, header.dim)));
    i = end;
  }
  if (header.payload_checksum != checksum.value())
    reject("the checksum of its content does not match: the file is damaged");
  const GalleryRows rows = index->view(n);
  const auto check = [&](int64_t panel) {
    check_rows(rows, panel * kPanelRows, std::min(n, (panel + 1) * kPanelRows));
  };
  parallel(ceil_div(n, kPanelRows), index->threads_for(n * header.dim), check, &interrupt);
  index->codes_ = index->encode_around_mean(n, interrupt);
  index->rows_when_centred_ = n;
  return index;
}

}  // namespace simplexfix::cpu
