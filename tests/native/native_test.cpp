// Tests of csrc/ without Python, to be built with sanitizers. `native_test [PART]` runs those whose names hold PART;
// `native_test PART FAULT` first makes a mistake that must be noticed.
//
// The memory of a Pool comes from mmap: AddressSanitizer does not see a row written behind its end. The tests compare
// every byte of every row instead, and rows that spill over spoil the neighbouring slot.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <new>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.hpp"
#include "crc32c.hpp"
#include "files.hpp"
#include "pool.hpp"
#include "scene.hpp"
#include "statistics.hpp"

using namespace fastdiff_test;

TEST(pool_is_zero_and_aligned) {
    for (const std::size_t size : {std::size_t{1}, std::size_t{4096}, std::size_t{(5u << 20) + 3}}) {
        const fastdiff::Pool pool(size);
        CHECK_EQUAL(pool.size(), size);
        CHECK_EQUAL(reinterpret_cast<std::uintptr_t>(pool.data()) % 4096, 0u);
        for (std::size_t i = 0; i < size; ++i) CHECK(pool.data()[i] == std::byte{0});
        pool.data()[size - 1] = std::byte{1};
    }
}

TEST(pool_refuses_what_cannot_be) {
    constexpr std::size_t kMost = std::numeric_limits<std::size_t>::max();
    for (const std::size_t size : {std::size_t{0}, std::size_t{1} << 48, std::size_t{1} << 60, kMost / 2, kMost - 4095,
                                   kMost})
        CHECK_THROWS(std::bad_alloc, fastdiff::Pool pool(size));
}

TEST(crc_is_the_sum_bit_by_bit) {
    const char* digits = "123456789";
    CHECK_EQUAL(fastdiff::crc32c(0, reinterpret_cast<const std::byte*>(digits), 9), 0xE3069283u);
    Rng rng(1);
    Bytes data(8 * 3 * 2048);
    for (std::byte& byte : data) byte = static_cast<std::byte>(rng.next() & 0xFF);
    for (int i = 0; i < 60; ++i) {
        const std::size_t begin = rng.range(0, 40), n = i < 40 ? static_cast<std::size_t>(i) : rng.range(0, 20000);
        const std::size_t cut = rng.range(0, n);
        const std::uint32_t expected = crc_model(data.data() + begin, n);
        for (const bool tables : {false, true}) {
            const std::uint32_t head = fastdiff::crc32c(0, data.data() + begin, cut, tables);
            CHECK_EQUAL(fastdiff::crc32c(head, data.data() + begin + cut, n - cut, tables), expected);
        }
        const std::size_t block = rng.range(1, n + 1);
        std::vector<std::uint32_t> sums((n + block - 1) / block);
        fastdiff::crc32c_blocks(data.data() + begin, n, block, sums.data());
        for (std::size_t j = 0; j < sums.size(); ++j)
            CHECK_EQUAL(sums[j], crc_model(data.data() + begin + j * block, std::min(block, n - j * block)));
    }
}

TEST(files_are_opened_again) {
    Rng rng(2);
    Scene scene = random_scene(100, 64, rng);
    std::vector<fastdiff::Extent> extents = scene.extents;
    const fastdiff::Files mine(extents, false);
    scene.files.clear();  // closes them
    Bytes out(scene.rows.size());
    Rows rows(100);
    for (std::size_t i = 0; i < 100; ++i) rows[i] = static_cast<std::int64_t>(i);
    fastdiff::gather_rows(fastdiff::RowReader(extents, 64), rows.data(), 100, out.data(), 2);
    CHECK(out == scene.rows);

    extents[0].fd = 1 << 20;
    CHECK_THROWS(std::system_error, fastdiff::Files files(extents, false));
}

TEST(direct_reads_give_the_same) {
    Rng rng(3);
    SceneOptions options;
    options.row_bytes = 1536;
    options.extent_rows = {5, 0, 1, 40, 90};
    options.alignment = 512;
    const Scene scene = make_scene(options, rng);
    const auto refused = fastdiff::why_not_direct(scene.extents, 1536);
    if (refused) {  // a file system that cannot, such as tmpfs
        CHECK(refused->find("refuses") != std::string::npos);
        return;
    }
    std::vector<fastdiff::Extent> extents = scene.extents;
    const fastdiff::Files mine(extents, true);
    const fastdiff::Pool pool(scene.rows.size());
    for (const bool checked : {false, true}) {
        fastdiff::RowReader reader(extents, 1536);
        if (checked) reader.check(scene.crc);
        Rows rows;
        for (int i = 0; i < 100; ++i) rows.push_back(static_cast<std::int64_t>(rng.range(0, 135)));
        fastdiff::gather_rows(reader, rows.data(), rows.size(), pool.data(), 3);
        for (std::size_t i = 0; i < rows.size(); ++i)
            CHECK(std::memcmp(pool.data() + i * 1536, scene.row(rows[i]), 1536) == 0);
    }
}

TEST(direct_reads_are_refused_with_a_reason) {
    Rng rng(4);
    SceneOptions options;
    options.row_bytes = 512;
    options.extent_rows = {3};
    options.alignment = 512;
    const Scene scene = make_scene(options, rng);
    CHECK(fastdiff::why_not_direct(scene.extents, 511)->find("511 bytes") != std::string::npos);
    std::vector<fastdiff::Extent> crooked = scene.extents;
    crooked[0].offset += 7;
    CHECK(fastdiff::why_not_direct(crooked, 512)->find("byte " + std::to_string(crooked[0].offset)) !=
          std::string::npos);
}

TEST(what_was_just_written_is_cached) {
    Rng rng(5);
    const Scene scene = random_scene(300, 200, rng);
    CHECK(fastdiff::cached_share(scene.extents, 200) == 1.0);
    CHECK(fastdiff::cached_share({}, 200) == 0.0);
    std::vector<fastdiff::Extent> beyond = scene.extents;  // a page behind the end is in no cache
    for (fastdiff::Extent& extent : beyond) extent.offset += std::uint64_t{1} << 30;
    CHECK(fastdiff::cached_share(beyond, 200) == 0.0);
}

TEST(statistics_of_any_shape) {
    Rng rng(6);
    for (int i = 0; i < 60; ++i) {
        const std::size_t n_rows = rng.range(1, 100), n_models = rng.range(1, 3), d_model = rng.range(1, 140);
        const std::size_t width = n_models * d_model;
        std::vector<float> values(n_rows * width);
        for (float& value : values) value = 100.0f + static_cast<float>(rng.range(0, 1000)) / 64.0f;
        std::vector<double> mean(width), m2(width), norms(n_models);
        fastdiff::RowStatistics sums{0, mean.data(), m2.data(), norms.data()};
        const std::size_t cut = rng.range(0, n_rows);
        fastdiff::add_rows(sums, values.data(), cut, n_models, d_model);
        fastdiff::add_rows(sums, values.data() + cut * width, n_rows - cut, n_models, d_model);
        CHECK_EQUAL(sums.n, n_rows);
        std::vector<long double> expected_norms(n_models);
        for (std::size_t c = 0; c < width; ++c) {
            long double sum = 0, squares = 0;
            for (std::size_t r = 0; r < n_rows; ++r) sum += values[r * width + c];
            for (std::size_t r = 0; r < n_rows; ++r) squares += std::pow(values[r * width + c] - sum / n_rows, 2.0L);
            CHECK(std::abs(mean[c] - sum / n_rows) < 1e-11L);
            CHECK(std::abs(m2[c] - squares) < 1e-8L);
        }
        for (std::size_t m = 0; m < n_models; ++m) {
            long double expected = 0;
            for (std::size_t r = 0; r < n_rows; ++r) {
                long double squares = 0;
                for (std::size_t c = 0; c < d_model; ++c)
                    squares += std::pow(static_cast<long double>(values[r * width + m * d_model + c]), 2.0L);
                expected += std::sqrt(squares);
            }
            CHECK(std::abs(norms[m] - expected) < 1e-8L);
        }
    }
}

namespace {

// One fault of each kind on purpose: whoever looks for it must find it.
void go_wrong(const std::string& how) {
    volatile std::size_t n = 10;
    if (how == "check") {
        CHECK_EQUAL(n, 11u);
    } else if (how == "address") {
        const std::vector<std::uint64_t> values(n);
        n = values.data()[n];
    } else if (how == "undefined") {
        n = 1 << (n + 30);
    } else if (how == "thread") {
        std::size_t shared = 0;
        std::thread other([&] { ++shared; });
        ++shared;
        other.join();
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc > 2) go_wrong(argv[2]);
    return run_tests(argc > 1 ? argv[1] : "");
}
