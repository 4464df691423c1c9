// Which row comes when: an endless stream of row indices, epoch after epoch, as a pure function of the position.
//
// Exact order (block_rows = 1): position p of an epoch is index order(p) of "order v1" (permutation.hpp).
//
// Block order, "block order v1": whole blocks of rows, which a disk reads fast, mixed in a window.
//
//   block k          indices [k·b, min(n, (k + 1)·b)) of [0, n);  there are nb = ceil(n / b)
//   order of blocks  entry j of epoch e is block β(j), β = Permutation(nb, seed xor 0xB5297A4D3F84D5A9, e)
//   windows          nw = ceil(nb / (P div b)), nearly equal: window w has entries [w·nb div nw, (w + 1)·nb div nw)
//   in a window      its blocks in ascending order number its rows 0 … m - 1; position q of the window is row π(q) of
//                    these, π = Permutation(m, seed + (w·R + r)·0x9E3779B97F4A7C15, e)
//
// P is the size of the pool in rows. A window holds at most P rows and, unless the epoch is one window, about P/2 or
// more. One window is an exact shuffle of all rows, for a single rank the one of the exact order.
//
// Rank r of R takes entries (exact order: positions) j = r, r + R, r + 2R, … and forms its windows of those alone: over
// an epoch the ranks are disjoint and together take every row once. Epochs of a rank differ by less than b rows, by
// where the short last block falls.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "permutation.hpp"

namespace fastdiff {

// The rows of one window and where each of them goes.
class Window {
 public:
    Window(std::vector<std::uint64_t> blocks, std::uint64_t n_rows, std::uint64_t block_rows, Permutation order)
        : blocks_(std::move(blocks)), n_rows_(n_rows), block_rows_(block_rows), order_(order) {}

    std::uint64_t n_rows() const { return n_rows_; }
    // Index in [0, n) of the window's row `local`; ascending in `local`.
    std::uint64_t index(std::uint64_t local) const {
        return blocks_[local / block_rows_] * block_rows_ + local % block_rows_;
    }
    // Where row `local` stands in the shuffled window, and which row stands at `position`.
    std::uint64_t position_of(std::uint64_t local) const { return order_.inverse(local); }
    std::uint64_t local_at(std::uint64_t position) const { return order_(position); }

 private:
    std::vector<std::uint64_t> blocks_;
    std::uint64_t n_rows_;
    std::uint64_t block_rows_;
    Permutation order_;
};

class BlockOrder {
 public:
    // n from 1 to 2^62, block_rows from 1, pool_rows from block_rows on, rank < world_size.
    // Throws std::invalid_argument otherwise.
    BlockOrder(std::uint64_t n, std::uint64_t seed, std::uint64_t block_rows, std::uint64_t pool_rows,
               std::uint64_t rank, std::uint64_t world_size);

    struct Place {
        std::uint64_t epoch;
        std::uint64_t row;  // of the epoch
    };

    bool exact() const { return block_rows_ == 1; }
    std::uint64_t block_rows() const { return block_rows_; }
    std::uint64_t rows_in_epoch(std::uint64_t epoch) const;
    // Where position `position` of the endless stream lies. There must be rows: rows_in_epoch(0) > 0.
    Place locate(std::uint64_t position) const;

    std::uint64_t n_windows() const { return n_windows_; }
    // The most rows a window has, and the least.
    std::uint64_t largest_window() const;
    std::uint64_t smallest_window() const;
    // Row of the epoch at which window w begins, for w up to n_windows() included.
    std::uint64_t window_start(std::uint64_t epoch, std::uint64_t w) const;
    // The window that holds a row of the epoch.
    std::uint64_t window_of(std::uint64_t epoch, std::uint64_t row) const;
    Window window(std::uint64_t epoch, std::uint64_t w) const;

    // Rows from `position` of the stream to the end of its window. Throws std::invalid_argument if there are no windows.
    std::uint64_t left_in_window(std::uint64_t position) const;

    // Indices at positions [position, position + count) of the stream.
    void indices(std::uint64_t position, std::size_t count, std::int64_t* out) const;

 private:
    Permutation blocks(std::uint64_t epoch) const;
    std::uint64_t first_entry(std::uint64_t w) const;
    // This rank's entry that is the short block, or n_entries_ if another rank has it or there is none.
    std::uint64_t short_entry(std::uint64_t epoch) const;

    std::uint64_t n_;
    std::uint64_t seed_;
    std::uint64_t block_rows_;
    std::uint64_t rank_;
    std::uint64_t world_size_;
    std::uint64_t n_blocks_;
    std::uint64_t missing_;    // rows by which the last block is short
    std::uint64_t n_entries_;  // blocks of this rank in an epoch
    std::uint64_t n_windows_;
};

}  // namespace fastdiff
