// The orders of csrc/permutation.hpp and csrc/order.hpp once more, written from their specifications: whole epochs in
// memory, no inverse, no searching. And CRC-32C, bit by bit.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

namespace fastdiff_test {

using Numbers = std::vector<std::uint64_t>;

inline std::uint64_t mix(std::uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// order(0), …, order(n - 1)
inline Numbers order_v1(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch) {
    std::uint64_t key[6], s = mix(mix(seed) ^ epoch);
    for (std::uint64_t i = 0; i < 6; ++i) key[i] = s = mix(s + i);
    unsigned bits = 0;
    while ((n - 1) >> bits != 0) ++bits;
    const unsigned h = std::max(1u, (bits + 1) / 2);
    const std::uint64_t mask = (std::uint64_t{1} << h) - 1;
    Numbers order;
    for (std::uint64_t start = 0; start < n; ++start) {
        std::uint64_t x = start;
        do {
            std::uint64_t l = x >> h, r = x & mask;
            for (const std::uint64_t k : key) {
                l ^= mix(r ^ k) & mask;
                std::swap(l, r);
            }
            x = l << h | r;
        } while (x >= n);
        order.push_back(x);
    }
    return order;
}

struct OrderModel {
    std::uint64_t n, seed, block_rows, pool_rows, rank, world_size;

    // The windows of an epoch, each with its indices in order. The exact order is one window.
    std::vector<Numbers> windows(std::uint64_t epoch) const {
        const std::uint64_t n_blocks = (n + block_rows - 1) / block_rows;
        const Numbers all = order_v1(n_blocks, block_rows == 1 ? seed : seed ^ 0xB5297A4D3F84D5A9u, epoch);
        Numbers entries;
        for (std::uint64_t j = rank; j < n_blocks; j += world_size) {
            entries.push_back(all[j]);
            if (n_blocks - j <= world_size) break;  // the sum might not fit
        }
        if (entries.empty()) return {};
        if (block_rows == 1) return {entries};
        const std::uint64_t ne = entries.size(), in_pool = pool_rows / block_rows;
        const std::uint64_t nw = ne / in_pool + (ne % in_pool != 0);
        std::vector<Numbers> found;
        for (std::uint64_t w = 0; w < nw; ++w) {
            Numbers ids(entries.begin() + static_cast<std::ptrdiff_t>(w * ne / nw),
                        entries.begin() + static_cast<std::ptrdiff_t>((w + 1) * ne / nw));
            std::sort(ids.begin(), ids.end());
            Numbers rows, shuffled;
            for (const std::uint64_t id : ids)
                for (std::uint64_t i = id * block_rows; i < std::min(n, (id + 1) * block_rows); ++i) rows.push_back(i);
            for (const std::uint64_t at :
                 order_v1(rows.size(), seed + (w * world_size + rank) * 0x9E3779B97F4A7C15u, epoch))
                shuffled.push_back(rows[at]);
            found.push_back(shuffled);
        }
        return found;
    }

    // How many epochs lie wholly before a position. Where each has n rows they need not be made.
    std::uint64_t epochs_before(std::uint64_t position) const { return world_size == 1 ? position / n : 0; }

    // Windows of the endless stream until `count` positions from `start` on are covered; what lies before `start` and
    // behind the end is cut off.
    std::vector<Numbers> stream(std::uint64_t start, std::uint64_t count) const {
        std::vector<Numbers> found;
        std::uint64_t epoch = epochs_before(start);
        for (start -= epoch * n; count > 0; ++epoch) {
            for (const Numbers& window : windows(epoch)) {
                if (start >= window.size()) {
                    start -= window.size();
                    continue;
                }
                const std::uint64_t n_here = std::min<std::uint64_t>(count, window.size() - start);
                const auto first = window.begin() + static_cast<std::ptrdiff_t>(start);
                if (n_here > 0) found.emplace_back(first, first + static_cast<std::ptrdiff_t>(n_here));
                count -= n_here;
                start = 0;
            }
        }
        return found;
    }
};

inline Numbers joined(const std::vector<Numbers>& parts) {
    Numbers all;
    for (const Numbers& part : parts) all.insert(all.end(), part.begin(), part.end());
    return all;
}

inline std::uint32_t crc_model(const std::byte* data, std::size_t n) {
    std::uint32_t crc = ~0u;
    for (std::size_t i = 0; i < n; ++i) {
        crc ^= static_cast<std::uint32_t>(data[i]);
        for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1u ? 0x82F63B78u : 0u);
    }
    return ~crc;
}

}  // namespace fastdiff_test
