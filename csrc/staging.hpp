// Copies rows into a buffer that a device will read, and sums them on the way.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff {

// Copies `n_rows` rows to `to`, past the processor's caches where it can: nobody will read them there, and a store
// that first fetches the line it replaces took up to three times as long when memory was busy.
//
// `sums[j]` gets the CRC-32C of rows j * block_rows ... of a file in which these rows have the numbers `first`, ...;
// a block that earlier rows have begun goes on from its sum.
void stage_rows(const std::byte* rows, std::size_t n_rows, std::size_t row_bytes, std::byte* to, std::uint32_t* sums,
                std::size_t first, std::size_t block_rows);

}  // namespace fastdiff
