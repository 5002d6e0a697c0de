// CRC-32 as in zlib, PNG and IEEE 802.3 (polynomial 0x04c11db7, reflected), eight bytes at a time.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace simplexfix::cpu {

class Crc32 {
 public:
  void add(const void* data, size_t size) {
    const auto* p = static_cast<const unsigned char*>(data);
    for (; size >= 8; size -= 8, p += 8) {
      uint64_t eight;
      std::memcpy(&eight, p, 8);
      eight ^= state_;
      state_ = 0;
      for (int i = 0; i < 8; ++i) state_ ^= kTables[7 - i][eight >> (8 * i) & 0xff];
    }
    for (; size > 0; --size, ++p) state_ = state_ >> 8 ^ kTables[0][(state_ ^ *p) & 0xff];
  }
  uint32_t value() const { return ~state_; }

 private:
  using Tables = std::array<std::array<uint32_t, 256>, 8>;
  // kTables[i][b]: the remainder of byte b followed by i zero bytes
  static constexpr Tables kTables = [] {
    Tables tables{};
    for (uint32_t b = 0; b < 256; ++b) {
      uint32_t r = b;
      for (int bit = 0; bit < 8; ++bit) r = r >> 1 ^ (r & 1 ? 0xedb88320u : 0);
      tables[0][b] = r;
    }
    for (size_t i = 1; i < 8; ++i)
      for (size_t b = 0; b < 256; ++b) tables[i][b] = tables[i - 1][b] >> 8 ^ tables[0][tables[i - 1][b] & 0xff];
    return tables;
  }();
  uint32_t state_ = 0xffffffffu;
};

}  // namespace simplexfix::cpu
