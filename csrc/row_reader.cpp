#include "row_reader.hpp"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <utility>

#include "crc32c.hpp"
#include "threads.hpp"

namespace fastdiff {

namespace {

// Pieces of one vectored read, and rows that one thread of gather_rows takes at a time: up to about 1 MiB, which costs
// far more than taking it.
constexpr std::size_t kPieces = 256;
constexpr std::size_t kGatherBytes = std::size_t{1} << 20;

// What O_DIRECT may ask of a buffer.
constexpr std::size_t kAlignment = 4096;

std::string rows_text(std::int64_t row, std::int64_t end_row) {
    return "rows " + std::to_string(row) + " to " + std::to_string(end_row - 1);
}

std::string describe(std::size_t extent, std::uint64_t offset, std::uint64_t wanted, std::uint64_t got, int error) {
    return "extent " + std::to_string(extent) + ": wanted " + std::to_string(wanted) + " bytes at byte " +
           std::to_string(offset) + ", got " + std::to_string(got) + " (" +
           (error == 0 ? "the file ends there" : std::strerror(error)) + ")";
}

// Fills the pieces from `offset` on, however few bytes each call returns. Returns {bytes read, errno}.
std::pair<std::uint64_t, int> read_pieces(int fd, std::uint64_t offset, std::uint64_t wanted, iovec* piece,
                                          std::size_t n_pieces) {
    std::uint64_t got = 0;
    while (got < wanted) {
        const ssize_t n = ::preadv(fd, piece, static_cast<int>(n_pieces), static_cast<off_t>(offset + got));
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return {got, n < 0 ? errno : 0};
        got += static_cast<std::uint64_t>(n);
        auto done = static_cast<std::size_t>(n);
        for (; n_pieces > 0 && done >= piece->iov_len; ++piece, --n_pieces) done -= piece->iov_len;
        if (n_pieces > 0) {
            piece->iov_base = static_cast<std::byte*>(piece->iov_base) + done;
            piece->iov_len -= done;
        }
    }
    return {got, 0};
}

template <class Word>
bool all_finite(const std::byte* row, std::size_t n_bytes, Word exponent) {
    // without an early exit the compiler uses vector instructions
    Word found = 0;
    for (std::size_t i = 0; i < n_bytes; i += sizeof(Word)) {
        Word word;
        std::memcpy(&word, row + i, sizeof word);
        found |= static_cast<Word>((word & exponent) == exponent);
    }
    return found == 0;
}

}  // namespace

ReadError::ReadError(std::size_t extent_, std::int64_t row_, std::int64_t end_row_, std::uint64_t offset_,
                     std::uint64_t wanted_, std::uint64_t got_, int error_)
    : RowError(describe(extent_, offset_, wanted_, got_, error_), row_, end_row_),
      extent(extent_),
      offset(offset_),
      wanted(wanted_),
      got(got_),
      error(error_) {}

CorruptRows::CorruptRows(std::int64_t row_, std::int64_t end_row_)
    : RowError(rows_text(row_, end_row_) + ": the checksum does not match", row_, end_row_) {}

NonFiniteRow::NonFiniteRow(std::int64_t row_)
    : RowError("row " + std::to_string(row_) + " holds NaN or infinity", row_, row_ + 1) {}

std::size_t first_nonfinite(const std::byte* rows, std::size_t n_rows, std::size_t row_bytes, Dtype dtype) {
    for (std::size_t i = 0; i < n_rows; ++i) {
        const std::byte* row = rows + i * row_bytes;
        const bool finite = dtype == Dtype::kFloat32    ? all_finite<std::uint32_t>(row, row_bytes, 0x7F800000u)
                            : dtype == Dtype::kBfloat16 ? all_finite<std::uint16_t>(row, row_bytes, 0x7F80u)
                                                        : all_finite<std::uint16_t>(row, row_bytes, 0x7C00u);
        if (!finite) return i;
    }
    return n_rows;
}

void RowReader::read(const Request* requests, std::size_t n, std::byte* to) const {
    if (n == 0 || row_bytes_ == 0) return;
    if (requests[0].row < 0 || requests[n - 1].row >= n_rows())
        throw std::out_of_range("row " + std::to_string(requests[0].row < 0 ? requests[0].row : requests[n - 1].row) +
                                " is outside [0, " + std::to_string(n_rows()) + ")");
    if (files_.empty()) {
        read_plain(requests, n, to);
    } else {
        read_checked(requests, n, to);
    }
}

void RowReader::read_plain(const Request* requests, std::size_t n, std::byte* to) const {
    std::array<iovec, kPieces> pieces;
    const auto found = std::upper_bound(extents_.begin(), extents_.end(), requests[0].row,
                                        [](std::int64_t row, const Extent& e) { return row < e.end_row; });
    auto extent = static_cast<std::size_t>(found - extents_.begin());
    for (std::size_t begin = 0; begin < n;) {
        const std::int64_t first = requests[begin].row;
        while (first >= extents_[extent].end_row) ++extent;
        const Extent& here = extents_[extent];
        // as many neighbours as one call takes
        std::size_t n_pieces = 0, i = begin;
        for (; i < n; ++i) {
            const std::int64_t row = requests[i].row;
            if (row != first + static_cast<std::int64_t>(i - begin) || row >= here.end_row) break;
            if (i > begin && requests[i].slot == requests[i - 1].slot + 1) {
                pieces[n_pieces - 1].iov_len += row_bytes_;
            } else {
                if (n_pieces == kPieces) break;
                pieces[n_pieces++] = iovec{to + requests[i].slot * row_bytes_, row_bytes_};
            }
        }
        const std::uint64_t offset = here.offset + static_cast<std::uint64_t>(first - here.first_row) * row_bytes_;
        const std::uint64_t wanted = (i - begin) * row_bytes_;
        const auto [got, error] = read_pieces(here.fd, offset, wanted, pieces.data(), n_pieces);
        if (got < wanted)
            throw ReadError(extent, first, first + static_cast<std::int64_t>(i - begin), offset, wanted, got, error);
        begin = i;
    }
}

void RowReader::read_checked(const Request* requests, std::size_t n, std::byte* to) const {
    std::unique_ptr<std::byte[]> memory;  // for 32 rows, made when first needed
    std::array<Request, kCrcRows> whole;
    std::size_t file = 0;
    for (std::size_t i = 0; i < n;) {
        while (requests[i].row >= files_[file].end_row) ++file;
        const std::int64_t number = (requests[i].row - files_[file].first_row) / kCrcRows;
        const std::int64_t first = files_[file].first_row + number * kCrcRows;
        const auto size = static_cast<std::size_t>(std::min(kCrcRows, files_[file].end_row - first));
        const auto end = first + static_cast<std::int64_t>(size);
        bool all = n - i >= size;
        for (std::size_t j = 0; all && j < size; ++j) all = requests[i + j].row == first + static_cast<std::int64_t>(j);
        std::uint32_t crc = 0;
        if (all) {  // in place: each row's bytes are still in the cache
            read_plain(requests + i, size, to);
            for (std::size_t j = 0; j < size; ++j) crc = crc32c(crc, to + requests[i + j].slot * row_bytes_, row_bytes_);
            i += size;
            if (crc != files_[file].crc[number]) throw CorruptRows(first, end);
            continue;
        }
        if (!memory) memory.reset(new std::byte[kCrcRows * row_bytes_ + kAlignment]);
        std::byte* bytes = memory.get();
        bytes += -reinterpret_cast<std::uintptr_t>(bytes) % kAlignment;
        for (std::size_t j = 0; j < size; ++j) whole[j] = {first + static_cast<std::int64_t>(j), j};
        read_plain(whole.data(), size, bytes);
        if (crc32c(0, bytes, size * row_bytes_) != files_[file].crc[number]) throw CorruptRows(first, end);
        for (; i < n && requests[i].row < end; ++i)
            std::memcpy(to + requests[i].slot * row_bytes_,
                        bytes + static_cast<std::size_t>(requests[i].row - first) * row_bytes_, row_bytes_);
    }
}

void gather_rows(const RowReader& reader, const std::int64_t* rows, std::size_t n_rows, std::byte* out,
                 unsigned n_threads) {
    std::vector<Request> requests(n_rows);
    bool sorted = true;
    for (std::size_t i = 0; i < n_rows; ++i) {
        if (rows[i] < 0 || rows[i] >= reader.n_rows())
            throw std::out_of_range("row " + std::to_string(rows[i]) + " is outside [0, " +
                                    std::to_string(reader.n_rows()) + ")");
        requests[i] = Request{rows[i], i};
        sorted = sorted && (i == 0 || rows[i - 1] <= rows[i]);
    }
    if (!sorted)
        std::sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) { return a.row < b.row; });

    const std::size_t part =
        std::clamp<std::size_t>(kGatherBytes / std::max<std::size_t>(reader.row_bytes(), 1), 1, kPieces);
    std::atomic<std::size_t> next{0};
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr failure;
    const auto work = [&]() noexcept {
        while (!failed.load(std::memory_order_relaxed)) {
            const std::size_t begin = next.fetch_add(part);
            if (begin >= n_rows) return;
            try {
                reader.read(requests.data() + begin, std::min(part, n_rows - begin), out);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(mutex);
                if (!failure) failure = std::current_exception();
                failed.store(true, std::memory_order_relaxed);
            }
        }
    };
    {
        Threads threads;
        const std::size_t n = std::min<std::size_t>(n_threads, (n_rows + part - 1) / part);
        for (std::size_t i = 1; i < n; ++i) threads.start(work);
        work();
    }
    if (failure) std::rethrow_exception(failure);
}

}  // namespace fastdiff
