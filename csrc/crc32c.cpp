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

// Bytes of a run, of which three are summed side by side. A row of 2 x 2304 bfloat16 (9216 bytes) is three long runs
// and four times three short ones.
constexpr std::size_t kLongRun = 2048, kShortRun = 256;

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

// The product of two polynomials modulo P. Bit 31 is x^0, as everywhere here.
constexpr std::uint32_t multiply(std::uint32_t a, std::uint32_t b) {
    std::uint32_t product = 0;
    for (; a != 0; a <<= 1) {
        if (a & 0x80000000u) product ^= b;
        b = (b >> 1) ^ ((b & 1u) ? kPolynomial : 0u);
    }
    return product;
}

using ShiftTables = std::array<std::array<std::uint32_t, 256>, 4>;

// The CRC register after n zero bytes is register * x^(8n) mod P. That is linear, so four looks by byte give it.
constexpr ShiftTables make_shift(std::size_t n_bytes) {
    std::uint32_t factor = 0x80000000u, power = 0x00800000u;  // 1 and x^8
    for (std::size_t n = n_bytes; n != 0; n >>= 1) {
        if (n & 1u) factor = multiply(factor, power);
        power = multiply(power, power);
    }
    ShiftTables tables{};
    for (std::uint32_t k = 0; k < 4; ++k)
        for (std::uint32_t b = 0; b < 256; ++b) tables[k][b] = multiply(b << (8 * k), factor);
    return tables;
}

std::uint32_t shift(const ShiftTables& tables, std::uint32_t crc) {
    return tables[0][crc & 0xFFu] ^ tables[1][(crc >> 8) & 0xFFu] ^ tables[2][(crc >> 16) & 0xFFu] ^
           tables[3][crc >> 24];
}

__attribute__((target("sse4.2"))) inline std::uint64_t add_word(std::uint64_t crc, const unsigned char* p) {
    std::uint64_t word;
    std::memcpy(&word, p, sizeof word);
    return _mm_crc32_u64(crc, word);
}

// The crc32 instruction takes 3 cycles, but one can start in each: three runs of kRun bytes side by side are three
// times as fast as one of 3 kRun. A register knows nothing of what came before its run; shifting it over the run
// that follows and adding that run's register, which began with 0, gives the register of both.
template <std::size_t kRun>
__attribute__((target("sse4.2"))) std::uint32_t update_runs(std::uint32_t crc, const unsigned char*& p,
                                                            std::size_t& n) {
    static_assert(kRun % 64 == 0);
    static constexpr ShiftTables kShift = make_shift(kRun);
    for (; n >= 3 * kRun; p += 3 * kRun, n -= 3 * kRun) {
        std::uint64_t a = crc, b = 0, c = 0;
        for (std::size_t line = 0; line < kRun; line += 64) {
            // the same lines of the next three runs: the processor does not see so many short runs coming, and without
            // this the sum of data outside its own cache took three times as long
            for (std::size_t run = 3; run < 6; ++run)
                _mm_prefetch(reinterpret_cast<const char*>(p + run * kRun + line), _MM_HINT_T0);
            for (std::size_t i = line; i < line + 64; i += 8) {
                a = add_word(a, p + i);
                b = add_word(b, p + kRun + i);
                c = add_word(c, p + 2 * kRun + i);
            }
        }
        crc = shift(kShift, static_cast<std::uint32_t>(a)) ^ static_cast<std::uint32_t>(b);
        crc = shift(kShift, crc) ^ static_cast<std::uint32_t>(c);
    }
    return crc;
}

__attribute__((target("sse4.2"))) std::uint32_t update_hardware(std::uint32_t crc, const unsigned char* p,
                                                                std::size_t n) {
    crc = update_runs<kLongRun>(crc, p, n);
    crc = update_runs<kShortRun>(crc, p, n);
    std::uint64_t wide = crc;
    for (; n >= 8; p += 8, n -= 8) wide = add_word(wide, p);
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
