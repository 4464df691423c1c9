#include "order.hpp"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace fastdiff {

namespace {

constexpr std::uint64_t kBlockSeed = 0xB5297A4D3F84D5A9u;
constexpr std::uint64_t kWindowSeed = 0x9E3779B97F4A7C15u;
constexpr std::uint64_t kMaxRows = std::uint64_t{1} << 62;

void require(bool holds, const std::string& message) {
    if (!holds) throw std::invalid_argument(message);
}

}  // namespace

BlockOrder::BlockOrder(std::uint64_t n, std::uint64_t seed, std::uint64_t block_rows, std::uint64_t pool_rows,
                       std::uint64_t rank, std::uint64_t world_size)
    : n_(n), seed_(seed), block_rows_(block_rows), rank_(rank), world_size_(world_size) {
    require(n >= 1 && n <= kMaxRows, "n must be from 1 to 2^62, got " + std::to_string(n));
    require(block_rows >= 1 && block_rows <= kMaxRows, "block_rows must be from 1 to 2^62");
    require(block_rows == 1 || pool_rows >= block_rows,
            "pool_rows must be at least block_rows = " + std::to_string(block_rows) + ", got " +
                std::to_string(pool_rows));
    require(rank < world_size, "rank must be less than world_size = " + std::to_string(world_size) + ", got " +
                                   std::to_string(rank));
    n_blocks_ = (n - 1) / block_rows + 1;
    missing_ = n_blocks_ * block_rows - n;
    n_entries_ = rank < n_blocks_ ? (n_blocks_ - rank - 1) / world_size + 1 : 0;
    // in whole blocks, so that the windows of the largest size fit the pool too
    const std::uint64_t blocks_in_pool = exact() ? 1 : pool_rows / block_rows;
    n_windows_ = exact() || n_entries_ == 0 ? 0 : (n_entries_ - 1) / blocks_in_pool + 1;
}

Permutation BlockOrder::blocks(std::uint64_t epoch) const {
    return Permutation(n_blocks_, exact() ? seed_ : seed_ ^ kBlockSeed, epoch);
}

std::uint64_t BlockOrder::short_entry(std::uint64_t epoch) const {
    if (missing_ == 0 || n_entries_ == 0) return n_entries_;
    const std::uint64_t entry = blocks(epoch).inverse(n_blocks_ - 1);
    return entry % world_size_ == rank_ ? entry / world_size_ : n_entries_;
}

std::uint64_t BlockOrder::rows_in_epoch(std::uint64_t epoch) const {
    const std::uint64_t full = n_entries_ * block_rows_;
    return short_entry(epoch) < n_entries_ ? full - missing_ : full;
}

BlockOrder::Place BlockOrder::locate(std::uint64_t position) const {
    if (missing_ == 0 || world_size_ == 1) {  // all epochs are equally long
        const std::uint64_t rows = rows_in_epoch(0);
        return {position / rows, position % rows};
    }
    std::uint64_t epoch = 0;
    for (std::uint64_t rows = rows_in_epoch(0); position >= rows; rows = rows_in_epoch(++epoch)) position -= rows;
    return {epoch, position};
}

std::uint64_t BlockOrder::first_entry(std::uint64_t w) const {
    // the product may need more than 64 bits
    return static_cast<std::uint64_t>(static_cast<unsigned __int128>(w) * n_entries_ / n_windows_);
}

std::uint64_t BlockOrder::largest_window() const {
    return n_windows_ == 0 ? 0 : ((n_entries_ - 1) / n_windows_ + 1) * block_rows_;
}

std::uint64_t BlockOrder::smallest_window() const {
    return n_windows_ == 0 ? 0 : n_entries_ / n_windows_ * block_rows_ - missing_;
}

std::uint64_t BlockOrder::window_start(std::uint64_t epoch, std::uint64_t w) const {
    const std::uint64_t entry = first_entry(w);
    return entry * block_rows_ - (short_entry(epoch) < entry ? missing_ : 0);
}

std::uint64_t BlockOrder::window_of(std::uint64_t epoch, std::uint64_t row) const {
    std::uint64_t low = 0, high = n_windows_;
    while (high - low > 1) {
        const std::uint64_t middle = low + (high - low) / 2;
        (window_start(epoch, middle) <= row ? low : high) = middle;
    }
    return low;
}

Window BlockOrder::window(std::uint64_t epoch, std::uint64_t w) const {
    const Permutation order = blocks(epoch);
    const std::uint64_t begin = first_entry(w), end = first_entry(w + 1);
    std::vector<std::uint64_t> ids;
    ids.reserve(end - begin);
    if (n_entries_ == n_blocks_ && n_windows_ == 1) {
        for (std::uint64_t id = 0; id < n_blocks_; ++id) ids.push_back(id);
    } else {
        for (std::uint64_t entry = begin; entry < end; ++entry) ids.push_back(order(rank_ + entry * world_size_));
        std::sort(ids.begin(), ids.end());
    }
    // the short block, if it is here, is the last one now
    const std::uint64_t n_rows = ids.size() * block_rows_ - (ids.back() == n_blocks_ - 1 ? missing_ : 0);
    const Permutation shuffle(n_rows, seed_ + (w * world_size_ + rank_) * kWindowSeed, epoch);
    return Window(std::move(ids), n_rows, block_rows_, shuffle);
}

std::uint64_t BlockOrder::left_in_window(std::uint64_t position) const {
    require(n_windows_ > 0, "there are no windows: the order is exact, or the rank has no rows");
    const Place place = locate(position);
    return window_start(place.epoch, window_of(place.epoch, place.row) + 1) - place.row;
}

void BlockOrder::indices(std::uint64_t position, std::size_t count, std::int64_t* out) const {
    require(n_entries_ > 0 || count == 0, "rank " + std::to_string(rank_) + " has no rows");
    while (count > 0) {
        const Place place = locate(position);
        if (exact()) {
            const Permutation order = blocks(place.epoch);
            const std::size_t here = std::min<std::uint64_t>(count, n_entries_ - place.row);
            for (std::size_t i = 0; i < here; ++i)
                out[i] = static_cast<std::int64_t>(order(rank_ + (place.row + i) * world_size_));
            out += here, position += here, count -= here;
            continue;
        }
        const std::uint64_t w = window_of(place.epoch, place.row);
        const Window found = window(place.epoch, w);
        const std::uint64_t first = place.row - window_start(place.epoch, w);
        const std::size_t here = std::min<std::uint64_t>(count, found.n_rows() - first);
        for (std::size_t i = 0; i < here; ++i)
            out[i] = static_cast<std::int64_t>(found.index(found.local_at(first + i)));
        out += here, position += here, count -= here;
    }
}

}  // namespace fastdiff
