// What a Prefetcher must give, by the models: which rows each of its slots holds and which of them are taken.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <memory>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "model.hpp"
#include "prefetcher.hpp"
#include "scene.hpp"

namespace fastdiff_test {

using fastdiff::Prefetcher;

struct ExpectedSlot {
    Rows read;   // in block order the whole window, whatever part of it is taken
    Rows taken;  // in order
};

struct Stream {
    OrderModel order{1, 0, 1, 1, 0, 1};
    fastdiff::PrefetchOptions options;
    Rows table;  // empty: the rows are the indices
    bool checked = false;

    std::unique_ptr<Prefetcher> open(const Scene& scene) const {
        const fastdiff::BlockOrder made(order.n, order.seed, order.block_rows, order.pool_rows, order.rank,
                                        order.world_size);
        return std::make_unique<Prefetcher>(scene.reader(checked), made, table.empty() ? nullptr : table.data(),
                                            options);
    }

    std::vector<ExpectedSlot> slots() const {
        std::vector<ExpectedSlot> found;
        if (order.block_rows == 1) {
            const Rows all = rows(joined(order.stream(options.start, options.count)));
            for (std::uint64_t at = 0; at < all.size(); at += options.batch_rows) {
                const std::uint64_t n = std::min<std::uint64_t>(all.size() - at, options.batch_rows);
                const auto first = all.begin() + static_cast<std::ptrdiff_t>(at);
                const Rows batch(first, first + static_cast<std::ptrdiff_t>(n));
                found.push_back({batch, batch});
            }
            return found;
        }
        std::uint64_t epoch = order.epochs_before(options.start);
        std::uint64_t begin = epoch * order.n;  // position of the window in the stream
        const std::uint64_t stop = options.start + options.count;
        for (; begin < stop; ++epoch)
            for (const Numbers& window : order.windows(epoch)) {
                const Rows all = rows(window);
                const std::uint64_t end = begin + all.size();
                const std::uint64_t from = std::max(begin, options.start), to = std::min(end, stop);
                if (from < to)
                    found.push_back({all, Rows(all.begin() + static_cast<std::ptrdiff_t>(from - begin),
                                               all.begin() + static_cast<std::ptrdiff_t>(to - begin))});
                begin = end;
            }
        return found;
    }

 private:
    Rows rows(const Numbers& indices) const {
        Rows found;
        for (const std::uint64_t i : indices) found.push_back(table.empty() ? static_cast<std::int64_t>(i) : table[i]);
        return found;
    }
};

inline Rows all_taken(const std::vector<ExpectedSlot>& slots) {
    Rows all;
    for (const ExpectedSlot& slot : slots) all.insert(all.end(), slot.taken.begin(), slot.taken.end());
    return all;
}

// A random part of the scene's rows in a random order; rows are small, so that a window has several tasks if large.
inline Stream random_stream(const Scene& scene, bool exact, Rng& rng) {
    Stream stream;
    const auto n = static_cast<std::uint64_t>(scene.n());
    const std::uint64_t block = exact ? 1 : rng.chance(50) ? 32 : rng.range(2, 50);
    const std::uint64_t world_size = rng.chance(70) ? 1 : rng.range(2, 3);
    stream.order = {rng.chance(70) ? n : rng.range(std::max<std::uint64_t>(n / 2, 1), n), rng.next(), block,
                    block * rng.range(1, rng.chance(50) ? 4 : 120), rng.range(0, world_size - 1), world_size};
    if (stream.order.windows(0).empty()) stream.order.rank = 0;  // so few rows that the later ranks have none
    stream.options.start = rng.chance(30) ? 0 : rng.range(0, 2 * stream.order.n);
    stream.options.count = rng.range(1, 2 * stream.order.n);
    stream.options.batch_rows = rng.range(1, 200);
    stream.options.n_slots = rng.range(1, 4);
    stream.options.n_threads = static_cast<unsigned>(rng.range(1, 5));
    stream.checked = rng.chance(30);
    if (rng.chance(30)) stream.options.finite = fastdiff::Dtype::kBfloat16;
    if (rng.chance(40)) {
        stream.table.resize(n);
        std::iota(stream.table.begin(), stream.table.end(), 0);
        for (std::size_t i = 1; i < n; ++i) std::swap(stream.table[i], stream.table[rng.range(0, i)]);
        stream.table.resize(stream.order.n);
    }
    return stream;
}

// The next rows, however long they take: the test's minute limits it.
inline Prefetcher::View take(Prefetcher& prefetcher, std::size_t n) {
    for (;;)
        if (const auto view = prefetcher.take(n, 5.0)) return *view;
}

inline void check_rows(const Scene& scene, const Prefetcher::View& view, const std::int64_t* expected) {
    for (std::size_t i = 0; i < view.n_rows; ++i)
        CHECK(std::memcmp(view.data + i * scene.row_bytes, scene.row(expected[i]), scene.row_bytes) == 0);
}

// An exception with all its numbers, to compare.
inline std::string described(const std::exception_ptr& failure) {
    const auto rows = [](const fastdiff::RowError& error) {
        return std::to_string(error.row) + " " + std::to_string(error.end_row);
    };
    try {
        std::rethrow_exception(failure);
    } catch (const fastdiff::ReadError& e) {
        return "read " + rows(e) + " " + e.what();
    } catch (const fastdiff::CorruptRows& e) {
        return "corrupt " + rows(e);
    } catch (const fastdiff::NonFiniteRow& e) {
        return "nonfinite " + rows(e);
    } catch (const std::out_of_range&) {
        return "out of range";
    }
}

// Takes everything and compares it. Returns the rows that came and, if it failed, how; it must fail again then.
inline std::pair<std::size_t, std::string> drain(const Scene& scene, const Stream& stream, const Rows& expected,
                                                 Rng& rng) {
    const std::unique_ptr<Prefetcher> prefetcher = stream.open(scene);
    const std::size_t most = rng.chance(50) ? 7 : 300;
    std::size_t n_came = 0;
    while (n_came < expected.size()) {
        Prefetcher::View view{};
        try {
            view = take(*prefetcher, rng.range(1, most));
        } catch (const std::exception&) {
            const std::string how = described(std::current_exception());
            try {
                take(*prefetcher, 1);
                CHECK(!"thrown again");
            } catch (const std::exception&) {
                CHECK_EQUAL(described(std::current_exception()), how);
            }
            return {n_came, how};
        }
        CHECK(view.n_rows > 0 && view.n_rows <= expected.size() - n_came);
        check_rows(scene, view, expected.data() + n_came);
        n_came += view.n_rows;
        prefetcher->release(view.slot);
    }
    return {n_came, ""};
}

}  // namespace fastdiff_test
