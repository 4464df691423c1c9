#include "row_gather.hpp"

#include <sys/uio.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

namespace fastdiff {

namespace {

// A chunk is what one thread takes at a time: about 1 MiB, which costs far more than taking it,
// and at most as many rows as fit one vectored read.
constexpr std::size_t kChunkBytes = std::size_t{1} << 20;
constexpr std::size_t kChunkRows = 256;

struct Request {
    std::int64_t row;
    std::size_t slot;
};

// Threads that are joined whatever happens to the one that started them.
class JoiningThreads {
 public:
    JoiningThreads() = default;
    JoiningThreads(const JoiningThreads&) = delete;
    JoiningThreads& operator=(const JoiningThreads&) = delete;
    ~JoiningThreads() {
        for (std::thread& thread : threads_) thread.join();
    }

    template <class Work>
    void start(Work work) {
        threads_.emplace_back(std::move(work));
    }

 private:
    std::vector<std::thread> threads_;
};

class Gather {
 public:
    Gather(const std::vector<Shard>& shards, std::size_t row_bytes, std::vector<Request> requests, std::byte* out)
        : shards_(shards), row_bytes_(row_bytes), requests_(std::move(requests)), out_(out) {
        chunk_rows_ = std::clamp<std::size_t>(kChunkBytes / row_bytes_, 1, kChunkRows);
    }

    std::size_t n_chunks() const { return (requests_.size() + chunk_rows_ - 1) / chunk_rows_; }

    // Takes chunks until none is left or some thread has failed. Never throws: an exception would end the process.
    void work() noexcept {
        while (!failed_.load(std::memory_order_relaxed)) {
            const std::size_t begin = next_.fetch_add(1) * chunk_rows_;
            if (begin >= requests_.size()) return;
            read_chunk(begin, std::min(begin + chunk_rows_, requests_.size()));
        }
    }

    void rethrow() const {
        if (failure_) throw ReadError(failure_->shard, failure_->offset, failure_->wanted, failure_->got, failure_->error);
    }

 private:
    struct Failure {
        std::size_t shard;
        std::uint64_t offset;
        std::uint64_t wanted;
        std::uint64_t got;
        int error;
    };

    std::size_t shard_of(std::int64_t row) const noexcept {
        const auto after = std::upper_bound(shards_.begin(), shards_.end(), row,
                                            [](std::int64_t value, const Shard& s) { return value < s.end_row; });
        return static_cast<std::size_t>(after - shards_.begin());
    }

    // Reads the requests [begin, end) one run of neighbouring rows at a time.
    void read_chunk(std::size_t begin, std::size_t end) noexcept {
        std::array<iovec, kChunkRows> pieces;
        std::size_t shard = shard_of(requests_[begin].row);
        while (begin < end && !failed_.load(std::memory_order_relaxed)) {
            const std::int64_t first = requests_[begin].row;
            while (first >= shards_[shard].end_row) ++shard;
            std::size_t n_pieces = 0;
            std::size_t i = begin;
            for (; i < end; ++i) {
                const std::int64_t row = requests_[i].row;
                if (row != first + static_cast<std::int64_t>(i - begin) || row >= shards_[shard].end_row) break;
                std::byte* to = out_ + requests_[i].slot * row_bytes_;
                if (i > begin && requests_[i].slot == requests_[i - 1].slot + 1) {
                    pieces[n_pieces - 1].iov_len += row_bytes_;
                } else {
                    pieces[n_pieces++] = iovec{to, row_bytes_};
                }
            }
            const std::uint64_t skip = static_cast<std::uint64_t>(first - shards_[shard].first_row) * row_bytes_;
            read_run(shard, shards_[shard].offset + skip, (i - begin) * row_bytes_, pieces.data(), n_pieces);
            begin = i;
        }
    }

    // Reads `wanted` bytes from `offset` on into the pieces, however few each call returns.
    void read_run(std::size_t shard, std::uint64_t offset, std::uint64_t wanted, iovec* piece,
                  std::size_t n_pieces) noexcept {
        std::uint64_t got = 0;
        while (got < wanted) {
            const ssize_t n =
                ::preadv(shards_[shard].fd, piece, static_cast<int>(n_pieces), static_cast<off_t>(offset + got));
            if (n < 0 && errno == EINTR) continue;
            if (n <= 0) {
                fail({shard, offset, wanted, got, n < 0 ? errno : 0});
                return;
            }
            got += static_cast<std::uint64_t>(n);
            std::size_t done = static_cast<std::size_t>(n);
            for (; n_pieces > 0 && done >= piece->iov_len; ++piece, --n_pieces) done -= piece->iov_len;
            if (n_pieces > 0) {
                piece->iov_base = static_cast<std::byte*>(piece->iov_base) + done;
                piece->iov_len -= done;
            }
        }
    }

    void fail(const Failure& failure) noexcept {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!failure_) failure_ = failure;
        failed_.store(true, std::memory_order_relaxed);
    }

    const std::vector<Shard>& shards_;
    std::size_t row_bytes_;
    std::vector<Request> requests_;
    std::byte* out_;
    std::size_t chunk_rows_;
    std::atomic<std::size_t> next_{0};
    std::atomic<bool> failed_{false};
    std::mutex mutex_;
    std::optional<Failure> failure_;
};

std::string describe(std::size_t shard, std::uint64_t offset, std::uint64_t wanted, std::uint64_t got, int error) {
    return "shard " + std::to_string(shard) + ": wanted " + std::to_string(wanted) + " bytes at byte " +
           std::to_string(offset) + ", got " + std::to_string(got) + " (" +
           (error == 0 ? "the file ends there" : std::strerror(error)) + ")";
}

}  // namespace

ReadError::ReadError(std::size_t shard_, std::uint64_t offset_, std::uint64_t wanted_, std::uint64_t got_, int error_)
    : std::runtime_error(describe(shard_, offset_, wanted_, got_, error_)),
      shard(shard_),
      offset(offset_),
      wanted(wanted_),
      got(got_),
      error(error_) {}

void gather_rows(const std::vector<Shard>& shards, std::size_t row_bytes, const std::int64_t* rows,
                 std::size_t n_rows, std::byte* out, unsigned n_threads) {
    if (n_rows == 0 || row_bytes == 0) return;
    const std::int64_t end_row = shards.empty() ? 0 : shards.back().end_row;
    std::vector<Request> requests(n_rows);
    bool sorted = true;
    for (std::size_t i = 0; i < n_rows; ++i) {
        if (rows[i] < 0 || rows[i] >= end_row)
            throw std::out_of_range("row " + std::to_string(rows[i]) + " is outside [0, " + std::to_string(end_row) +
                                    ")");
        requests[i] = Request{rows[i], i};
        sorted = sorted && (i == 0 || rows[i - 1] <= rows[i]);
    }
    if (!sorted)
        std::sort(requests.begin(), requests.end(), [](const Request& a, const Request& b) { return a.row < b.row; });

    Gather gather(shards, row_bytes, std::move(requests), out);
    {
        JoiningThreads threads;
        const std::size_t n = std::min<std::size_t>(n_threads, gather.n_chunks());
        for (std::size_t i = 1; i < n; ++i) threads.start([&gather] { gather.work(); });
        gather.work();
    }
    gather.rethrow();
}

}  // namespace fastdiff
