// Rows read ahead: every row equal and in its place, whatever the threads, the views held, the faults and the end.
#include "prefetcher.hpp"

#include <chrono>
#include <condition_variable>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <set>
#include <stdexcept>
#include <thread>

#include "check.hpp"
#include "interrupted.hpp"
#include "scene.hpp"
#include "stream.hpp"

using namespace fastdiff_test;

namespace {

void pause(Rng& rng, std::uint64_t microseconds) {
    std::this_thread::sleep_for(std::chrono::microseconds(rng.range(0, microseconds)));
}

Stream stream_of(std::uint64_t n, std::uint64_t block_rows, std::uint64_t pool_rows, std::uint64_t start,
                 std::uint64_t count) {
    Stream stream;
    stream.order = {n, 5, block_rows, pool_rows, 0, 1};
    stream.options.start = start;
    stream.options.count = count;
    stream.options.batch_rows = 40;
    return stream;
}

}  // namespace

TEST(every_row_comes_in_order) {
    Rng rng(1);
    for (int i = 0; i < 120; ++i) {
        const std::size_t row_bytes = 2 * rng.range(1, 40);
        const Scene scene = random_scene(rng.range(1, i % 3 == 0 ? 6000 : 400), row_bytes, rng);
        const Stream stream = random_stream(scene, i % 2 == 0, rng);
        const Rows expected = all_taken(stream.slots());
        CHECK_EQUAL(expected.size(), stream.options.count);
        const auto [n_came, how] = drain(scene, stream, expected, rng);
        CHECK_EQUAL(how, std::string());
        CHECK_EQUAL(n_came, expected.size());
    }
}

// A task is 2 MiB here, several to a window.
TEST(every_large_row_comes_in_order) {
    Rng rng(2);
    const Scene scene = random_scene(700, 9000, rng);
    for (const unsigned n_threads : {1u, 4u})
        for (const bool checked : {false, true}) {
            Stream stream = stream_of(700, 32, 500, 0, 1300);
            stream.options.n_threads = n_threads;
            stream.checked = checked;
            CHECK_EQUAL(drain(scene, stream, all_taken(stream.slots()), rng).second, std::string());
        }
}

TEST(the_stream_begins_anywhere) {
    Rng rng(3);
    const Scene scene = random_scene(101, 6, rng);
    for (const std::uint64_t block_rows : {1u, 8u})
        for (std::uint64_t start = 0; start < 320; ++start) {
            const Stream stream = stream_of(101, block_rows, 24, start, rng.range(1, 60));
            CHECK_EQUAL(drain(scene, stream, all_taken(stream.slots()), rng).second, std::string());
        }
}

TEST(views_stay_as_they_are_until_another_thread_releases_them) {
    Rng rng(4);
    for (int i = 0; i < 40; ++i) {
        const Scene scene = random_scene(rng.range(50, 3000), 2 * rng.range(1, 30), rng);
        Stream stream = random_stream(scene, i % 2 == 0, rng);
        stream.options.count += 500;
        const Rows expected = all_taken(stream.slots());
        const auto prefetcher = stream.open(scene);
        std::mutex mutex;
        std::condition_variable changed;
        std::deque<std::pair<Prefetcher::View, std::size_t>> held;
        bool ended = false;
        std::thread releaser([&] {
            Rng mine(static_cast<std::uint64_t>(i));
            std::unique_lock<std::mutex> lock(mutex);
            for (;;) {
                changed.wait(lock, [&] { return ended || !held.empty(); });
                if (held.empty()) return;
                std::swap(held.front(), held[mine.range(0, held.size() - 1)]);
                const auto [view, at] = held.front();
                held.pop_front();
                lock.unlock();
                if (mine.chance(10)) pause(mine, 300);
                check_rows(scene, view, expected.data() + at);
                prefetcher->release(view.slot);
                lock.lock();
            }
        });
        for (std::size_t at = 0; at < expected.size();) {
            const Prefetcher::View view = take(*prefetcher, rng.range(1, 60));
            const std::lock_guard<std::mutex> lock(mutex);
            held.emplace_back(view, at);
            at += view.n_rows;
            changed.notify_one();
        }
        {
            const std::lock_guard<std::mutex> lock(mutex);
            ended = true;
        }
        changed.notify_one();
        releaser.join();
    }
}

TEST(nothing_comes_while_every_slot_is_held) {
    Rng rng(5);
    const Scene scene = random_scene(400, 8, rng);
    for (const std::uint64_t block_rows : {1u, 8u})
        for (std::size_t n_slots = 1; n_slots <= 3; ++n_slots) {
            Stream stream = stream_of(400, block_rows, 80, 0, 2000);
            stream.options.n_slots = n_slots;
            stream.options.n_threads = 2;
            const Rows expected = all_taken(stream.slots());
            const auto prefetcher = stream.open(scene);
            std::deque<std::pair<Prefetcher::View, std::size_t>> held;
            std::size_t at = 0, n_taken = 0;
            for (const ExpectedSlot& slot : stream.slots()) {
                if (n_taken >= n_slots) {
                    CHECK_THROWS(fastdiff::HeldTooLong, prefetcher->take(1, 0.02));
                    // the views of the oldest slot are released, the last of them after another look
                    const std::size_t oldest = held.front().first.slot;
                    while (!held.empty() && held.front().first.slot == oldest) {
                        const auto [view, first] = held.front();
                        held.pop_front();
                        if (held.empty() || held.front().first.slot != oldest)
                            CHECK_THROWS(fastdiff::HeldTooLong, prefetcher->take(1, 0.02));
                        check_rows(scene, view, expected.data() + first);
                        prefetcher->release(oldest);
                    }
                }
                for (std::size_t left = slot.taken.size(); left > 0; left -= held.back().first.n_rows) {
                    held.emplace_back(take(*prefetcher, 25), at);
                    at += held.back().first.n_rows;
                }
                if (++n_taken == 3 * n_slots) break;
            }
        }
}

TEST(nothing_is_not_an_error_while_rows_are_being_read) {
    Rng rng(6);
    const Scene scene = random_scene(3000, 500, rng);
    bool waited = false;
    for (int i = 0; i < 50; ++i) {
        const Stream stream = stream_of(3000, 32, 3000, 0, 3000);
        const auto prefetcher = stream.open(scene);
        auto view = prefetcher->take(10, 0.0);
        waited = waited || !view;
        if (!view) view = take(*prefetcher, 10);
        check_rows(scene, *view, stream.slots()[0].taken.data());
    }
    CHECK(waited);
}

TEST(it_ends_at_any_moment_and_the_memory_stays) {
    Rng rng(7);
    const Scene scene = random_scene(3000, 64, rng);
    for (int i = 0; i < 100; ++i) {
        Stream stream = random_stream(scene, i % 2 == 0, rng);
        stream.options.count += 1000;
        stream.options.n_threads = static_cast<unsigned>(rng.range(1, 6));
        auto prefetcher = stream.open(scene);
        const std::shared_ptr<fastdiff::Pool> pool = prefetcher->pool();
        const Rows expected = all_taken(stream.slots());
        std::vector<std::pair<Prefetcher::View, std::size_t>> held;
        std::size_t at = 0;
        if (rng.chance(50)) pause(rng, 400);
        for (std::uint64_t n = rng.range(0, 12); n > 0; --n) {
            std::optional<Prefetcher::View> view;
            try {
                view = prefetcher->take(rng.range(1, 100), 0.002);
            } catch (const fastdiff::HeldTooLong&) {
                break;
            }
            if (!view) continue;
            if (rng.chance(30)) {
                held.emplace_back(*view, at);
            } else {
                prefetcher->release(view->slot);
            }
            at += view->n_rows;
        }
        if (rng.chance(30)) {
            prefetcher->stop();
            CHECK_THROWS(std::runtime_error, prefetcher->take(1, 10.0));
            for (const auto& view : held) prefetcher->release(view.first.slot);
            prefetcher->stop();
        }
        prefetcher.reset();
        for (const auto& [view, first] : held) check_rows(scene, view, expected.data() + first);
    }
}

TEST(a_consumer_that_waits_is_told_of_the_end) {
    Rng rng(8);
    const Scene scene = random_scene(300, 8, rng);
    for (int i = 0; i < 40; ++i) {
        Stream stream = random_stream(scene, i % 2 == 0, rng);
        stream.options.count = 100000;
        const auto prefetcher = stream.open(scene);
        bool told = false;
        std::thread consumer([&] {
            try {
                // never released, so that it comes to wait
                for (std::uint64_t left = stream.options.count; left > 0;) left -= take(*prefetcher, 1000).n_rows;
            } catch (const fastdiff::HeldTooLong&) {
                fail(__FILE__, __LINE__, "waited to the end");
            } catch (const std::runtime_error&) {
                told = true;
            }
        });
        pause(rng, 3000);
        prefetcher->stop();
        consumer.join();
        CHECK(told);
    }
}

// Faults in a few rows. The first window that holds one fails, by its lowest row, after all windows before it came.
TEST(faults_come_in_their_place_whatever_the_threads) {
    Rng rng(9);
    enum Kind { kNonFinite, kCorrupt, kTruncated, kOutside };
    for (int i = 0; i < 80; ++i) {
        const auto kind = static_cast<Kind>(i % 4);
        const std::size_t row_bytes = 2 * rng.range(1, 20);
        const Scene scene = random_scene(rng.range(40, i % 5 == 0 ? 5000 : 600), row_bytes, rng);
        Stream stream = random_stream(scene, rng.chance(50), rng);
        stream.checked = kind == kCorrupt;
        stream.options.finite.reset();
        if (kind == kNonFinite) stream.options.finite = fastdiff::Dtype::kFloat16;
        const auto n = static_cast<std::uint64_t>(scene.n());

        std::set<std::int64_t> bad;  // the rows that a fault is reported for
        for (std::uint64_t left = rng.range(1, 3); left > 0; --left) {
            const auto row = static_cast<std::int64_t>(rng.range(0, n - 1));
            if (kind == kNonFinite) {
                scene.spoil(row, row_bytes - 2, {std::byte{0}, std::byte{0xFC}});
                bad.insert(row);
            } else if (kind == kCorrupt) {
                if (bad.count(row) > 0) continue;  // a second flip could undo the first
                scene.flip(row, rng.range(0, row_bytes - 1), 3);
                for (const fastdiff::FileCrc& part : scene.crc)
                    for (std::int64_t block = part.first_row; block < part.end_row; block += 32)
                        if (block <= row && row < std::min(block + 32, part.end_row))
                            for (std::int64_t r = block; r < std::min(block + 32, part.end_row); ++r) bad.insert(r);
            } else if (kind == kTruncated) {
                const std::uint64_t size = scene.offset_of(row) + rng.range(0, row_bytes - 1);
                if (size < scene.file(row).size()) scene.file(row).truncate(size);
                for (std::int64_t r = 0; r < scene.n(); ++r)
                    if (scene.offset_of(r) + row_bytes > scene.file(r).size()) bad.insert(r);
            } else {
                stream.table.resize(stream.order.n);
                for (std::size_t j = 0; j < stream.table.size(); ++j) stream.table[j] = static_cast<std::int64_t>(j);
                const std::int64_t outside = rng.chance(50) ? -1 : scene.n();
                stream.table[rng.range(0, stream.table.size() - 1)] = outside;
                bad.insert(outside);
            }
        }

        std::size_t n_before = 0;
        std::int64_t lowest = std::numeric_limits<std::int64_t>::max();
        const std::vector<ExpectedSlot> slots = stream.slots();
        for (const ExpectedSlot& slot : slots) {
            for (const std::int64_t row : slot.read)
                if (bad.count(row) > 0) lowest = std::min(lowest, row);
            if (lowest < std::numeric_limits<std::int64_t>::max()) break;
            n_before += slot.taken.size();
        }
        const Rows expected = all_taken(slots);
        std::string first;
        for (const unsigned n_threads : {1u, 2u, 7u}) {
            stream.options.n_threads = n_threads;
            stream.options.n_slots = rng.range(1, 4);
            const auto [n_came, how] = drain(scene, stream, expected, rng);
            CHECK_EQUAL(n_came, n_before);
            if (n_threads == 1) first = how;
            CHECK_EQUAL(how, first);
            CHECK_EQUAL(how.empty(), n_before == expected.size());
            if (how.empty()) continue;
            std::int64_t row = 0, end = 0;
            char name[16];
            if (kind == kOutside) {
                CHECK_EQUAL(how, std::string("out of range"));
            } else {
                CHECK_EQUAL(std::sscanf(how.c_str(), "%15s %ld %ld", name, &row, &end), 3);
                const char* wanted = kind == kNonFinite ? "nonfinite" : kind == kCorrupt ? "corrupt" : "read";
                CHECK_EQUAL(std::string(name), std::string(wanted));
                CHECK(row <= lowest && lowest < end);
                if (kind == kNonFinite) CHECK_EQUAL(row, lowest);
            }
        }
    }
}

TEST(of_faults_of_two_kinds_the_lower_row_is_told) {
    Rng rng(10);
    SceneOptions options;
    options.n_files = 4;
    options.extent_rows = {100, 100};
    Scene scene = make_scene(options, rng);
    while (scene.file_of[0] == scene.file_of[1]) scene = make_scene(options, rng);
    scene.spoil(3, 0, {std::byte{0xFF}, std::byte{0xFF}});
    scene.file(100).truncate(0);
    for (const std::uint64_t block_rows : {1u, 32u})
        for (const unsigned n_threads : {1u, 4u}) {
            Stream stream = stream_of(200, block_rows, 500, 0, 200);
            stream.options.batch_rows = 200;
            stream.options.n_threads = n_threads;
            stream.options.finite = fastdiff::Dtype::kBfloat16;
            CHECK_EQUAL(drain(scene, stream, all_taken(stream.slots()), rng).second, std::string("nonfinite 3 4"));
        }
}

// Wherever memory runs out, it is said, nothing hangs and what came before is right.
TEST(no_memory_is_an_error_like_any_other) {
    Rng rng(12);
    const Scene scene = random_scene(500, 16, rng);
    for (int i = 0; i < 200; ++i) {
        Stream stream = random_stream(scene, i % 2 == 0, rng);
        const Rows expected = all_taken(stream.slots());
        std::size_t at = 0;
        bool told = false;
        try {
            const FailingAllocation failing(i / 2);
            const auto prefetcher = stream.open(scene);
            while (at < expected.size()) {
                const Prefetcher::View view = take(*prefetcher, 1000);
                check_rows(scene, view, expected.data() + at);
                at += view.n_rows;
                prefetcher->release(view.slot);
            }
        } catch (const std::bad_alloc&) {
            told = true;
        }
        CHECK(told || at == expected.size());
        CHECK(told || i >= 4);
    }
}

// The list of the blocks of the third window finds no memory, while the second one may still be being read.
TEST(no_memory_for_a_window_ends_the_stream_behind_the_windows_before) {
    Rng rng(13);
    const Scene scene = random_scene(37 * 5 * 50, 16, rng);
    for (int i = 0; i < 30; ++i) {
        Stream stream = stream_of(37 * 5 * 50, 50, 37 * 50, 0, 37 * 5 * 50);
        stream.options.n_threads = 6;
        stream.options.n_slots = 3;
        const std::vector<ExpectedSlot> slots = stream.slots();
        const Rows expected = all_taken(slots);
        std::size_t at = 0;
        try {
            const FailingAllocation failing(2, 37 * sizeof(std::uint64_t));
            const auto prefetcher = stream.open(scene);
            for (;;) {
                const Prefetcher::View view = take(*prefetcher, 1000);
                check_rows(scene, view, expected.data() + at);
                at += view.n_rows;
                prefetcher->release(view.slot);
            }
        } catch (const std::bad_alloc&) {
        }
        CHECK_EQUAL(at, slots[0].taken.size() + slots[1].taken.size());
    }
}

TEST(what_cannot_be_is_refused) {
    Rng rng(11);
    const Scene scene = random_scene(50, 8, rng);
    const auto with = [](auto change) {
        Stream stream = stream_of(50, 8, 16, 0, 10);
        change(stream);
        return stream;
    };
    CHECK_THROWS(std::invalid_argument, with([](Stream& s) { s.options.count = 0; }).open(scene));
    CHECK_THROWS(std::invalid_argument, with([](Stream& s) { s.options.batch_rows = 0; }).open(scene));
    CHECK_THROWS(std::invalid_argument, with([](Stream& s) { s.options.n_slots = 0; }).open(scene));
    CHECK_THROWS(std::invalid_argument, with([](Stream& s) { s.options.n_threads = 0; }).open(scene));
    CHECK_THROWS(std::invalid_argument, with([](Stream& s) { s.order.rank = 7, s.order.world_size = 8; }).open(scene));
    CHECK_THROWS(std::bad_alloc, with([](Stream& s) { s.options.n_slots = std::size_t{1} << 48; }).open(scene));
    // bytes that do not fit a number: the product must not wrap round to a small pool
    CHECK_THROWS(std::bad_alloc, with([](Stream& s) { s.options.n_slots = (std::size_t{1} << 57) + 1; }).open(scene));
    CHECK_THROWS(std::bad_alloc, with([](Stream& s) {
                     s.order.block_rows = s.order.pool_rows = 1;
                     s.options.batch_rows = s.options.count = (std::uint64_t{1} << 61) + 1;
                 }).open(scene));
}
