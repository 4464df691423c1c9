// Rows out of files: every byte compared, and every kind of fault.
#include "row_reader.hpp"

#include <cerrno>
#include <numeric>
#include <stdexcept>

#include "check.hpp"
#include "scene.hpp"

using namespace fastdiff_test;
using fastdiff::Request;
using fastdiff::RowReader;

namespace {

constexpr std::byte kUntouched{0x5A};

// Reads the rows, which must be ascending, to the slots, and checks that they came and that nothing else was written.
void read_and_compare(const Scene& scene, const RowReader& reader, const std::vector<Request>& requests,
                      std::uint64_t n_slots) {
    Bytes expected(n_slots * scene.row_bytes, kUntouched);
    Bytes out = expected;
    for (const Request& r : requests)
        std::memcpy(expected.data() + r.slot * scene.row_bytes, scene.row(r.row), scene.row_bytes);
    reader.read(requests.data(), requests.size(), out.data());
    CHECK(out == expected);
}

// Ascending rows: runs, gaps and repeats. Slots: neighbours or anywhere, and some stay empty.
std::vector<Request> random_requests(const Scene& scene, Rng& rng, std::uint64_t& n_slots) {
    std::vector<Request> requests;
    const std::uint64_t gaps = rng.range(0, 2) * 20, repeats = rng.range(0, 1) * 20;
    for (std::int64_t row = 0; row < scene.n(); ++row) {
        if (rng.chance(gaps)) continue;
        do requests.push_back({row, 0});
        while (rng.chance(repeats));
    }
    n_slots = requests.size() + rng.range(0, 3);
    std::vector<std::uint64_t> slots(n_slots);
    std::iota(slots.begin(), slots.end(), 0);
    const std::uint64_t disorder = rng.range(0, 2) * 50;
    for (std::uint64_t i = 1; i < n_slots; ++i)
        if (rng.chance(disorder)) std::swap(slots[i], slots[rng.range(0, i)]);
    for (std::size_t i = 0; i < requests.size(); ++i) requests[i].slot = slots[i];
    return requests;
}

std::vector<Request> run_of(std::int64_t begin, std::int64_t end) {
    std::vector<Request> requests;
    for (std::int64_t row = begin; row < end; ++row)
        requests.push_back({row, static_cast<std::uint64_t>(row - begin)});
    return requests;
}

}  // namespace

TEST(rows_come_from_any_extents) {
    Rng rng(1);
    for (const std::size_t row_bytes : {1u, 2u, 3u, 8u, 511u, 4096u, 5001u, 70000u})
        for (int i = 0; i < (row_bytes > 9000 ? 2 : 15); ++i) {
            const Scene scene = random_scene(rng.range(1, row_bytes > 4000 ? 70 : 400), row_bytes, rng);
            for (const bool checked : {false, true}) {
                std::uint64_t n_slots = 0;
                const std::vector<Request> requests = random_requests(scene, rng, n_slots);
                read_and_compare(scene, scene.reader(checked), requests, n_slots);
            }
        }
}

TEST(more_pieces_than_one_call_takes) {
    Rng rng(2);
    SceneOptions options;
    options.extent_rows = {2000};
    for (const std::size_t row_bytes : {1u, 24u}) {
        options.row_bytes = row_bytes;
        const Scene scene = make_scene(options, rng);
        for (const std::int64_t n : {255, 256, 257, 511, 512, 513, 2000})
            for (const std::uint64_t step : {1u, 2u}) {
                std::vector<Request> requests = run_of(0, n);
                for (Request& r : requests) r.slot = static_cast<std::uint64_t>(n - 1 - r.row) * step;
                for (const bool checked : {false, true})
                    read_and_compare(scene, scene.reader(checked), requests, static_cast<std::uint64_t>(n) * step);
            }
    }
}

TEST(rows_outside_are_refused_before_anything_is_read) {
    Rng rng(3);
    const Scene scene = random_scene(50, 4, rng);
    for (const bool checked : {false, true}) {
        const RowReader reader = scene.reader(checked);
        Bytes out(4 * 4, kUntouched);
        for (const std::vector<Request>& requests : std::vector<std::vector<Request>>{
                 {{-1, 0}, {3, 1}}, {{0, 0}, {50, 1}}, {{INT64_MIN, 0}}, {{7, 0}, {INT64_MAX, 1}}}) {
            CHECK_THROWS(std::out_of_range, reader.read(requests.data(), requests.size(), out.data()));
            Rows rows;
            for (const Request& r : requests) rows.push_back(r.row);
            CHECK_THROWS(std::out_of_range, fastdiff::gather_rows(reader, rows.data(), rows.size(), out.data(), 2));
        }
        CHECK(out == Bytes(4 * 4, kUntouched));
        reader.read(nullptr, 0, nullptr);
    }
    const Request first{0, 0};
    CHECK_THROWS(std::out_of_range, RowReader({}, 4).read(&first, 1, nullptr));
}

TEST(a_file_that_ends_early_is_reported_with_its_numbers) {
    Rng rng(4);
    for (int i = 0; i < 200; ++i) {
        const std::size_t row_bytes = rng.range(1, 40);
        const Scene scene = random_scene(rng.range(1, 120), row_bytes, rng);
        const std::int64_t begin = rng.row(0, scene.n()), end = rng.row(begin, scene.n()) + 1;
        // ends in a row that is asked for, or before it
        const std::int64_t bad = rng.row(begin, end);
        const std::uint64_t cut = scene.offset_of(bad) + rng.range(0, row_bytes - 1);
        const std::uint64_t size = rng.chance(20) ? rng.range(0, cut) : cut;
        scene.file(bad).truncate(size);
        // the first extent of the run that misses a byte
        std::size_t extent = scene.extent_of(begin);
        std::int64_t first = 0, stop = 0;
        for (;; ++extent) {
            const fastdiff::Extent& e = scene.extents[extent];
            first = std::max(begin, e.first_row), stop = std::min(end, e.end_row);
            if (first >= stop) continue;
            const std::uint64_t needed = scene.offset_of(stop - 1) + row_bytes;
            if (scene.files[scene.file_of[extent]].size() < needed) break;
        }
        const std::vector<Request> requests = run_of(begin, end);
        Bytes out(requests.size() * row_bytes, kUntouched);
        bool thrown = false;
        try {
            scene.reader().read(requests.data(), requests.size(), out.data());
        } catch (const fastdiff::ReadError& error) {
            thrown = true;
            const std::uint64_t wanted = static_cast<std::uint64_t>(stop - first) * row_bytes;
            const std::uint64_t there = scene.files[scene.file_of[extent]].size(), offset = scene.offset_of(first);
            CHECK_EQUAL(error.extent, extent);
            CHECK_EQUAL(error.row, first);
            CHECK_EQUAL(error.end_row, stop);
            CHECK_EQUAL(error.offset, offset);
            CHECK_EQUAL(error.wanted, wanted);
            CHECK_EQUAL(error.got, there > offset ? there - offset : 0);
            CHECK_EQUAL(error.error, 0);
            CHECK_EQUAL(std::string(error.what()),
                        "extent " + std::to_string(extent) + ": wanted " + std::to_string(wanted) + " bytes at byte " +
                            std::to_string(offset) + ", got " + std::to_string(error.got) + " (the file ends there)");
        }
        CHECK(thrown);
        const auto n_good = static_cast<std::size_t>(first - begin) * row_bytes;
        CHECK(std::memcmp(out.data(), scene.row(begin), n_good) == 0);
        Rows rows(requests.size());
        std::iota(rows.rbegin(), rows.rend(), begin);
        CHECK_THROWS(fastdiff::ReadError,
                     fastdiff::gather_rows(scene.reader(rng.chance(50)), rows.data(), rows.size(), out.data(), 3));
    }
}

TEST(the_error_of_the_system_is_reported) {
    std::byte out[4];
    const Request first{0, 0};
    int ends[2];
    CHECK(::pipe(ends) == 0);
    const TempFile file;
    constexpr std::uint64_t kNegative = std::uint64_t{1} << 63;
    const struct {
        int fd;
        std::uint64_t offset;
        int expected;
    } cases[] = {{-1, 0, EBADF}, {ends[0], 0, ESPIPE}, {file.fd(), kNegative, EINVAL}};
    for (const auto& [fd, offset, expected] : cases) {
        try {
            RowReader({{fd, offset, 0, 1}}, 4).read(&first, 1, out);
            CHECK(!"thrown");
        } catch (const fastdiff::ReadError& error) {
            CHECK_EQUAL(error.error, expected);
            CHECK_EQUAL(error.got, 0u);
        }
    }
    ::close(ends[0]), ::close(ends[1]);
}

TEST(any_flipped_bit_is_found) {
    Rng rng(5);
    for (int i = 0; i < 400; ++i) {
        const std::size_t row_bytes = rng.range(1, 60);
        const Scene scene = random_scene(rng.range(1, 200), row_bytes, rng);
        const std::int64_t bad = rng.row(0, scene.n());
        std::int64_t first = 0, end = 0;  // the block of the bad row
        for (const fastdiff::FileCrc& part : scene.crc)
            if (part.first_row <= bad && bad < part.end_row) {
                first = bad - (bad - part.first_row) % 32;
                end = std::min(first + 32, part.end_row);
            }
        scene.flip(bad, rng.range(0, row_bytes - 1), static_cast<unsigned>(rng.range(0, 7)));
        // all rows of the block, one of them, or all but one: each way through read_checked
        std::vector<Request> requests;
        const std::uint64_t way = rng.range(0, 3);
        const std::int64_t one = rng.row(first, end);
        for (std::int64_t row = 0; row < scene.n(); ++row) {
            const bool in_block = first <= row && row < end;
            if (!in_block || way == 0 || (way == 1 && row == one) || (way == 2 && row == bad) ||
                (way == 3 && (row != one || end - first == 1)))
                requests.push_back({row, static_cast<std::uint64_t>(row)});
        }
        Bytes out(scene.rows.size());
        try {
            scene.reader(true).read(requests.data(), requests.size(), out.data());
            CHECK(!"found");
        } catch (const fastdiff::CorruptRows& error) {
            CHECK_EQUAL(error.row, first);
            CHECK_EQUAL(error.end_row, end);
        }
        // and the other blocks are read as if nothing were
        requests.erase(std::remove_if(requests.begin(), requests.end(),
                                      [&](const Request& r) { return first <= r.row && r.row < end; }),
                       requests.end());
        scene.reader(true).read(requests.data(), requests.size(), out.data());
        for (const Request& r : requests)
            CHECK(std::memcmp(out.data() + r.slot * row_bytes, scene.row(r.row), row_bytes) == 0);
    }
}

TEST(a_wrong_checksum_is_found) {
    Rng rng(6);
    Scene scene = random_scene(500, 16, rng);
    std::vector<Request> requests = run_of(0, 500);
    Bytes out(500 * 16);
    for (std::size_t i = 0; i < scene.sums.size(); ++i) {
        const std::uint32_t right = scene.sums[i];
        scene.sums[i] ^= 1u << rng.range(0, 31);
        CHECK_THROWS(fastdiff::CorruptRows, scene.reader(true).read(requests.data(), 500, out.data()));
        scene.sums[i] = right;
    }
    scene.reader(true).read(requests.data(), 500, out.data());
    CHECK(out == scene.rows);
}

TEST(gathered_rows_do_not_depend_on_the_threads) {
    Rng rng(7);
    for (const std::size_t row_bytes : {1u, 24u, 6000u, (1u << 20) + 1}) {
        const bool large = row_bytes > 6000;
        const Scene scene = random_scene(large ? 5 : 3000 / (row_bytes / 100 + 1), row_bytes, rng);
        for (unsigned n_threads = 0; n_threads <= 8; ++n_threads) {
            const std::uint64_t n = large ? 4 : rng.range(0, row_bytes < 100 ? 1500 : 200);
            Rows rows;
            for (std::uint64_t i = 0; i < n; ++i) rows.push_back(rng.row(0, scene.n()));
            if (n_threads % 2 == 0) std::sort(rows.begin(), rows.end());
            Bytes out((n + 1) * row_bytes, kUntouched);
            fastdiff::gather_rows(scene.reader(n_threads % 3 == 0), rows.data(), n, out.data(), n_threads);
            for (std::uint64_t i = 0; i < n; ++i)
                CHECK(std::memcmp(out.data() + i * row_bytes, scene.row(rows[i]), row_bytes) == 0);
            const Bytes rest(row_bytes, kUntouched);
            CHECK(std::memcmp(out.data() + n * row_bytes, rest.data(), row_bytes) == 0);
        }
    }
}

// Each thread takes 256 rows, which are as many reads, and the last of them fails: in all threads at about one time.
TEST(threads_that_fail_together_give_one_of_their_errors) {
    Rng rng(8);
    SceneOptions options;
    for (int i = 0; i < 12; ++i) options.extent_rows.insert(options.extent_rows.end(), {511, 1});
    Scene scene = make_scene(options, rng);
    for (std::size_t i = 1; i < scene.extents.size(); i += 2) scene.extents[i].fd = -1;
    Rows rows;
    for (std::int64_t row = 1; row < scene.n(); row += 2) rows.push_back(row);
    Bytes out(rows.size() * options.row_bytes);
    for (int i = 0; i < 40; ++i) {
        try {
            fastdiff::gather_rows(scene.reader(), rows.data(), rows.size(), out.data(), 8);
            CHECK(!"thrown");
        } catch (const fastdiff::ReadError& error) {
            CHECK_EQUAL(error.row % 512, 511);
            CHECK_EQUAL(error.error, EBADF);
        }
    }
}

TEST(nonfinite_is_said_of_every_pattern_rightly) {
    using fastdiff::Dtype;
    const auto first = [](const auto& values, Dtype dtype, std::size_t row_bytes) {
        const std::size_t n_rows = values.size() * sizeof(values[0]) / row_bytes;
        return fastdiff::first_nonfinite(reinterpret_cast<const std::byte*>(values.data()), n_rows, row_bytes, dtype);
    };
    for (std::uint32_t bits = 0; bits < 1u << 16; ++bits) {
        const std::vector<std::uint16_t> one{static_cast<std::uint16_t>(bits)};
        CHECK_EQUAL(first(one, Dtype::kBfloat16, 2) == 0, (bits >> 7 & 0xFF) == 0xFF);
        CHECK_EQUAL(first(one, Dtype::kFloat16, 2) == 0, (bits >> 10 & 0x1F) == 0x1F);
        for (const std::uint32_t low : {0u, 1u, 0xFFFFu})
            CHECK_EQUAL(first(std::vector<std::uint32_t>{bits << 16 | low}, Dtype::kFloat32, 4) == 0,
                        (bits >> 7 & 0xFF) == 0xFF);
    }
    // wherever in a row it stands, and the first row of several
    for (std::size_t width = 1; width <= 40; ++width)
        for (std::size_t at = 0; at < 4 * width; ++at) {
            std::vector<std::uint16_t> values(4 * width, 0x7BFF);
            values[at] = 0x7C00;
            values.back() = 0xFC01;
            CHECK_EQUAL(first(values, Dtype::kFloat16, 2 * width), at / width);
            std::vector<std::uint32_t> wide(4 * width, 0x7F7FFFFF);
            wide[at] = 0x7FC00000;
            CHECK_EQUAL(first(wide, Dtype::kFloat32, 4 * width), at / width);
        }
    CHECK_EQUAL(first(std::vector<std::uint16_t>(12, 0x7F7F), Dtype::kBfloat16, 6), 4u);
}
