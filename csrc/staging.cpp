#include "staging.hpp"

#include "copy.hpp"
#include "crc32c.hpp"

namespace fastdiff {

void stage_rows(const std::byte* rows, std::size_t n_rows, std::size_t row_bytes, std::byte* to, std::uint32_t* sums,
                std::size_t first, std::size_t block_rows) {
    for (std::size_t i = 0; i < n_rows; ++i) {
        const std::byte* row = rows + i * row_bytes;
        // the copy first: it reads in order, and brings the row into the cache for the sum, which reads in three places
        copy_past_caches(to + i * row_bytes, row, row_bytes);
        std::uint32_t& sum = sums[(first + i) / block_rows];
        sum = crc32c((first + i) % block_rows == 0 ? 0 : sum, row, row_bytes);
    }
    flush_copies();
}

}  // namespace fastdiff
