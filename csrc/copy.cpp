#include "copy.hpp"

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace fastdiff {

void copy_past_caches(std::byte* to, const std::byte* from, std::size_t n) {
    std::size_t done = 0;
#if defined(__x86_64__)
    if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
        for (; done + 64 <= n; done += 64) {
            const auto* in = reinterpret_cast<const __m128i*>(from + done);
            auto* out = reinterpret_cast<__m128i*>(to + done);
            const __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1), c = _mm_loadu_si128(in + 2),
                          d = _mm_loadu_si128(in + 3);
            _mm_stream_si128(out, a);
            _mm_stream_si128(out + 1, b);
            _mm_stream_si128(out + 2, c);
            _mm_stream_si128(out + 3, d);
        }
    }
#endif
    std::memcpy(to + done, from + done, n - done);
}

void flush_copies() {
#if defined(__x86_64__)
    _mm_sfence();
#endif
}

}  // namespace fastdiff
