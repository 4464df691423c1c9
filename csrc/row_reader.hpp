// Rows out of several files, each to its own place in memory. No Python, no HDF5, no torch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace fastdiff {

// Rows [first_row, end_row) of the store, back to back in file `file` from byte `offset` on.
// `fd` must be open for reading; positioned reads keep no file position, so threads share it.
struct Extent {
    int fd;
    std::uint64_t offset;
    std::int64_t first_row;
    std::int64_t end_row;
};

// The checksums of one file: crc[j] is the CRC-32C of its rows 32j … 32j + 31, which begin at row first_row of the store.
struct FileCrc {
    std::int64_t first_row;
    std::int64_t end_row;
    const std::uint32_t* crc;
};

constexpr std::int64_t kCrcRows = 32;

// Something is wrong with rows [row, end_row).
class RowError : public std::runtime_error {
 public:
    RowError(const std::string& what, std::int64_t row_, std::int64_t end_row_)
        : std::runtime_error(what), row(row_), end_row(end_row_) {}

    std::int64_t row;
    std::int64_t end_row;
};

// A read that failed: `error` is the errno, or 0 when the file ended after `got` of the `wanted` bytes.
class ReadError : public RowError {
 public:
    ReadError(std::size_t extent, std::int64_t row, std::int64_t end_row, std::uint64_t offset, std::uint64_t wanted,
              std::uint64_t got, int error);

    std::size_t extent;
    std::uint64_t offset;
    std::uint64_t wanted;
    std::uint64_t got;
    int error;
};

// Rows whose bytes are not those that were written.
class CorruptRows : public RowError {
 public:
    CorruptRows(std::int64_t row, std::int64_t end_row);
};

// A row that holds NaN or infinity.
class NonFiniteRow : public RowError {
 public:
    explicit NonFiniteRow(std::int64_t row);
};

// Which bits of a value of this type are its exponent; a value is NaN or infinite if all of them are set.
enum class Dtype { kBfloat16, kFloat16, kFloat32 };

// The first of n rows that holds NaN or infinity, or n.
std::size_t first_nonfinite(const std::byte* rows, std::size_t n_rows, std::size_t row_bytes, Dtype dtype);

// Row `row` of the store belongs at `row_bytes · slot` of the buffer.
struct Request {
    std::int64_t row;
    std::uint64_t slot;
};

class RowReader {
 public:
    // `extents` in ascending row order without gaps, the first one starting at row 0.
    RowReader(std::vector<Extent> extents, std::size_t row_bytes) : extents_(std::move(extents)), row_bytes_(row_bytes) {}

    std::size_t row_bytes() const { return row_bytes_; }
    std::int64_t n_rows() const { return extents_.empty() ? 0 : extents_.back().end_row; }
    const std::vector<Extent>& extents() const { return extents_; }

    // Check each row against the checksum of its 32 rows from now on: the files must cover all rows, and the checksums
    // outlive the reader. All 32 rows are read for one.
    void check(std::vector<FileCrc> files) { files_ = std::move(files); }
    bool checks() const { return !files_.empty(); }

    // Reads the requests, which must be ascending in `row`; neighbouring rows with one call. Rows may repeat.
    // Throws ReadError, CorruptRows; std::out_of_range, before anything is read, for a row that no extent holds.
    void read(const Request* requests, std::size_t n, std::byte* to) const;

 private:
    void read_plain(const Request* requests, std::size_t n, std::byte* to) const;
    void read_checked(const Request* requests, std::size_t n, std::byte* to) const;

    std::vector<Extent> extents_;
    std::size_t row_bytes_;
    std::vector<FileCrc> files_;
};

// Reads row rows[i] to out + i · row_bytes for i < n, in any order, with several threads (the caller's is one of them).
// The result does not depend on `n_threads`. Throws what RowReader::read throws; all threads have ended by then.
void gather_rows(const RowReader& reader, const std::int64_t* rows, std::size_t n_rows, std::byte* out,
                 unsigned n_threads);

}  // namespace fastdiff
