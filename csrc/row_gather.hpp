// Copies whole rows out of several files in any order, with several threads. No Python, no HDF5, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fastdiff {

// One file that holds rows [first_row, end_row) of the store, back to back from byte `offset` on.
// `fd` must be open for reading; positioned reads keep no file position, so threads share it.
struct Shard {
    int fd;
    std::uint64_t offset;
    std::int64_t first_row;
    std::int64_t end_row;
};

// A read that failed: `error` is the errno, or 0 when the file ended after `got` of the `wanted` bytes.
class ReadError : public std::runtime_error {
 public:
    ReadError(std::size_t shard, std::uint64_t offset, std::uint64_t wanted, std::uint64_t got, int error);

    std::size_t shard;
    std::uint64_t offset;
    std::uint64_t wanted;
    std::uint64_t got;
    int error;
};

// Reads row rows[i], `row_bytes` long, to out + i * row_bytes, for i < n_rows. Rows may repeat and come in any order;
// they are read in file order, and rows that are neighbours in a file in one call, because the kernel's read-ahead
// and the disk want that. The result does not depend on `n_threads` (at least 1; the caller's thread is one of them).
// `shards` are in ascending row order without gaps, the first one starting at row 0.
// Throws std::out_of_range for a row no shard holds (before anything is read) and ReadError when a read fails; all
// threads have ended by then.
void gather_rows(const std::vector<Shard>& shards, std::size_t row_bytes, const std::int64_t* rows,
                 std::size_t n_rows, std::byte* out, unsigned n_threads);

}  // namespace fastdiff
