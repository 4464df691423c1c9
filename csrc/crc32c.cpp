#include "crc32c.hpp"

#include <algorithm>
#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <nmmintrin.h>
#endif

namespace fastdiff {

namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78u;

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b]: the CRC register after byte b and k zero bytes.
constexpr Tables make_tables() {
    Tables tables{};
    for (std::uint32_t b = 0; b < 256; ++b) {
        std::uint32_t crc = b;
        for (int bit = 0; bit < 8; ++bit) crc = (crc >> 1) ^ ((crc & 1u) ? kPolynomial : 0u);
        tables[0][b] = crc;
    }
    for (std::size_t k = 1; k < 8; ++k)
        for (std::size_t b = 0; b < 256; ++b)
            tables[k][b] = (tables[k - 1][b] >> 8) ^ tables[0][tables[k - 1][b] & 0xFFu];
    return tables;
}

constexpr Tables kTables = make_tables();

std::uint32_t update_tables(std::uint32_t crc, const unsigned char* p, std::size_t n) {
    for (; n >= 8; p += 8, n -= 8) {
        std::uint32_t next = 0;
        for (std::size_t i = 0; i < 4; ++i) next ^= kTables[7 - i][p[i] ^ ((crc >> (8 * i)) & 0xFFu)];
        for (std::size_t i = 4; i < 8; ++i) next ^= kTables[7 - i][p[i]];
        crc = next;
    }
    for (; n > 0; ++p, --n) crc = (crc >> 8) ^ kTables[0][(crc ^ *p) & 0xFFu];
    return crc;
}

#if defined(__x86_64__)
__attribute__((target("sse4.2"))) std::uint32_t update_hardware(std::uint32_t crc, const unsigned char* p,
                                                                std::size_t n) {
    std::uint64_t wide = crc;
    for (; n >= 8; p += 8, n -= 8) {
        std::uint64_t word;
        std::memcpy(&word, p, sizeof word);
        wide = _mm_crc32_u64(wide, word);
    }
    crc = static_cast<std::uint32_t>(wide);
    for (; n > 0; ++p, --n) crc = _mm_crc32_u8(crc, *p);
    return crc;
}
#endif

}  // namespace

bool crc32c_has_hardware() {
#if defined(__x86_64__)
    return __builtin_cpu_supports("sse4.2");
#else
    return false;
#endif
}

std::uint32_t crc32c(std::uint32_t value, const std::byte* data, std::size_t n_bytes, bool tables) {
    const auto* bytes = reinterpret_cast<const unsigned char*>(data);
#if defined(__x86_64__)
    if (!tables && crc32c_has_hardware()) return ~update_hardware(~value, bytes, n_bytes);
#else
    static_cast<void>(tables);
#endif
    return ~update_tables(~value, bytes, n_bytes);
}

void crc32c_blocks(const std::byte* data, std::size_t n_bytes, std::size_t block_bytes, std::uint32_t* out,
                   bool tables) {
    for (std::size_t start = 0; start < n_bytes; start += block_bytes)
        *out++ = crc32c(0, data + start, std::min(block_bytes, n_bytes - start), tables);
}

}  // namespace fastdiff
