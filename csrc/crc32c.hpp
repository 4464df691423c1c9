// CRC-32C (Castagnoli, reflected polynomial 0x82F63B78): the checksum of iSCSI, ext4 and SSE4.2's crc32 instruction.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff {

// True if this processor has the crc32 instruction; otherwise tables do the same sum, several times slower.
bool crc32c_has_hardware();

// The CRC of what `value` is the CRC of, followed by `data`. Start with 0: crc32c(0, "123456789") is 0xE3069283.
// `tables` forces the portable path, so that a test can compare the two.
std::uint32_t crc32c(std::uint32_t value, const std::byte* data, std::size_t n_bytes, bool tables = false);

// One CRC per `block_bytes` of data; the last block may be shorter. `out` has ceil(n_bytes / block_bytes) places.
void crc32c_blocks(const std::byte* data, std::size_t n_bytes, std::size_t block_bytes, std::uint32_t* out,
                   bool tables = false);

}  // namespace fastdiff
