// The orders against their models, which are written from the specifications.
#include "order.hpp"

#include <limits>
#include <stdexcept>

#include "check.hpp"
#include "model.hpp"
#include "permutation.hpp"
#include "scene.hpp"

using fastdiff::BlockOrder;
using fastdiff::Permutation;
using namespace fastdiff_test;

namespace {

const Numbers kAwkward = {1,  2,  3,  4,  5,  7,  8,  9,   15,  16,  17,   31,
                          32, 33, 63, 64, 65, 97, 255, 256, 257, 1023, 1025, 4099};
constexpr std::uint64_t kMost = std::uint64_t{1} << 62;

Numbers indices(const BlockOrder& order, std::uint64_t position, std::size_t count) {
    std::vector<std::int64_t> out(count);
    order.indices(position, count, out.data());
    return Numbers(out.begin(), out.end());
}

// Everything a BlockOrder says of its first epochs, and stretches of the stream.
void compare(const OrderModel& model, Rng& rng) {
    const BlockOrder order(model.n, model.seed, model.block_rows, model.pool_rows, model.rank, model.world_size);
    std::uint64_t total = 0;
    for (std::uint64_t epoch = 0; epoch < 3; ++epoch) {
        const std::vector<Numbers> windows = model.windows(epoch);
        const std::uint64_t n_rows = joined(windows).size();
        CHECK_EQUAL(order.rows_in_epoch(epoch), n_rows);
        if (n_rows == 0) continue;
        if (!order.exact()) {
            CHECK_EQUAL(order.n_windows(), windows.size());
            std::uint64_t start = 0;
            for (std::uint64_t w = 0; w < windows.size(); ++w) {
                const std::uint64_t size = windows[w].size();
                CHECK(order.smallest_window() <= size && size <= order.largest_window());
                CHECK_EQUAL(order.window_start(epoch, w), start);
                for (const std::uint64_t row : {start, start + size / 2, start + size - 1}) {
                    CHECK_EQUAL(order.window_of(epoch, row), w);
                    CHECK_EQUAL(order.left_in_window(total + row), start + size - row);
                    CHECK_EQUAL(order.locate(total + row).epoch, epoch);
                    CHECK_EQUAL(order.locate(total + row).row, row);
                }
                const fastdiff::Window window = order.window(epoch, w);
                CHECK_EQUAL(window.n_rows(), size);
                for (std::uint64_t local = 0; local < size; ++local) {
                    CHECK(local == 0 || window.index(local - 1) < window.index(local));
                    CHECK_EQUAL(window.local_at(window.position_of(local)), local);
                    CHECK_EQUAL(windows[w][window.position_of(local)], window.index(local));
                }
                start += size;
            }
            CHECK_EQUAL(order.window_start(epoch, windows.size()), n_rows);
            CHECK(order.largest_window() <= model.pool_rows);
        }
        total += n_rows;
    }
    for (int i = 0; total > 0 && i < 4; ++i) {
        const std::uint64_t start = rng.range(0, 2 * total), count = rng.range(1, total);
        CHECK(indices(order, start, count) == joined(model.stream(start, count)));
    }
}

}  // namespace

TEST(permutation_is_a_bijection_with_its_inverse) {
    Rng rng(1);
    for (const std::uint64_t n : kAwkward) {
        for (int i = 0; i < 3; ++i) {
            const std::uint64_t seed = rng.next(), epoch = rng.range(0, 5);
            const Permutation order(n, seed, epoch);
            const Numbers expected = order_v1(n, seed, epoch);
            std::vector<bool> seen(n);
            for (std::uint64_t x = 0; x < n; ++x) {
                CHECK_EQUAL(order(x), expected[x]);
                CHECK_EQUAL(order.inverse(order(x)), x);
                CHECK(!seen[order(x)]);
                seen[order(x)] = true;
            }
            const std::uint64_t start = rng.range(0, n - 1);
            std::vector<std::int64_t> part(n - start);
            fastdiff::permute(order, start, part.size(), part.data());
            CHECK(Numbers(part.begin(), part.end()) ==
                  Numbers(expected.begin() + static_cast<std::ptrdiff_t>(start), expected.end()));
        }
    }
}

TEST(permutation_of_very_many) {
    Rng rng(2);
    for (int bits = 13; bits <= 62; ++bits) {
        for (const std::uint64_t n : {(std::uint64_t{1} << bits) - 1, std::uint64_t{1} << bits,
                                      (std::uint64_t{1} << bits) - rng.range(0, 1 << 12)}) {
            const Permutation order(n, rng.next(), rng.next());
            for (int i = 0; i < 20; ++i) {
                const std::uint64_t x = i == 0 ? 0 : i == 1 ? n - 1 : rng.range(0, n - 1);
                CHECK(order(x) < n && order.inverse(x) < n);
                CHECK_EQUAL(order.inverse(order(x)), x);
                CHECK_EQUAL(order(order.inverse(x)), x);
            }
        }
    }
}

TEST(order_is_what_the_specification_says) {
    Rng rng(3);
    for (const std::uint64_t n : kAwkward)
        for (std::uint64_t world_size = 1; world_size <= (n > 1000 ? 2 : 7); ++world_size)
            for (int i = 0; i < 4; ++i) {
                const std::uint64_t block_rows = i == 0 ? 1 : rng.range(1, i == 1 && n < 1000 ? 4 : 70);
                const std::uint64_t pool_rows = rng.range(block_rows, block_rows * rng.range(1, i == 3 ? 200 : 4));
                compare({n, rng.next(), block_rows, pool_rows, rng.range(0, world_size - 1), world_size}, rng);
            }
}

TEST(ranks_share_an_epoch) {
    Rng rng(4);
    for (const std::uint64_t n : kAwkward)
        for (std::uint64_t world_size = 1; world_size <= 7; ++world_size) {
            const std::uint64_t block_rows = rng.range(1, 40), pool_rows = block_rows * rng.range(1, 4);
            Numbers all;
            for (std::uint64_t rank = 0; rank < world_size; ++rank) {
                const BlockOrder order(n, 9, block_rows, pool_rows, rank, world_size);
                const std::uint64_t before = order.rows_in_epoch(0), here = order.rows_in_epoch(1);
                if (here == 0) continue;
                const Numbers part = indices(order, before, here);
                all.insert(all.end(), part.begin(), part.end());
            }
            std::sort(all.begin(), all.end());
            CHECK_EQUAL(all.size(), n);
            for (std::uint64_t i = 0; i < n; ++i) CHECK_EQUAL(all[i], i);
        }
}

TEST(order_of_very_many) {
    Rng rng(5);
    for (int i = 0; i < 300; ++i) {
        const std::uint64_t n = kMost - rng.range(0, 1000), block_rows = rng.range(1, 100);
        const std::uint64_t world_size = i % 3 == 0 ? rng.range(2, 9) : 1;
        const BlockOrder order(n, rng.next(), block_rows, rng.range(block_rows, 5000), world_size - 1, world_size);
        const std::uint64_t rows = order.rows_in_epoch(0);
        const std::uint64_t position = rng.range(0, rows - 1);
        for (const std::uint64_t index : indices(order, position, 3)) CHECK(index < n);
        if (order.exact()) continue;
        const std::uint64_t w = order.window_of(0, position);
        CHECK(order.window_start(0, w) <= position && position < order.window_start(0, w + 1));
        CHECK_EQUAL(order.window_start(0, order.n_windows()), rows);
        CHECK_EQUAL(order.left_in_window(position), order.window_start(0, w + 1) - position);
        const fastdiff::Window window = order.window(0, w);
        CHECK_EQUAL(window.n_rows(), order.window_start(0, w + 1) - order.window_start(0, w));
    }
}

TEST(order_refuses_nonsense) {
    constexpr std::uint64_t kHuge = std::numeric_limits<std::uint64_t>::max();
    const auto make = [](std::uint64_t n, std::uint64_t block, std::uint64_t pool, std::uint64_t rank,
                         std::uint64_t world) { return BlockOrder(n, 0, block, pool, rank, world); };
    make(kMost, kMost, kMost, 0, 1);
    make(1, 1, 0, 0, kHuge);  // the exact order has no pool
    CHECK_THROWS(std::invalid_argument, make(0, 1, 1, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(kMost + 1, 1, 1, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(kHuge, 32, 64, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(9, 0, 1, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(9, kHuge, kHuge, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(9, 4, 3, 0, 1));
    CHECK_THROWS(std::invalid_argument, make(9, 4, 4, 0, 0));
    CHECK_THROWS(std::invalid_argument, make(9, 4, 4, 3, 3));
    const BlockOrder none = make(9, 4, 4, 3, 4);
    CHECK_EQUAL(none.rows_in_epoch(0), 0u);
    none.indices(0, 0, nullptr);
    std::int64_t out = 0;
    CHECK_THROWS(std::invalid_argument, none.indices(0, 1, &out));
}
