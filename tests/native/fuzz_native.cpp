// Orders, reads and streams made of any bytes, also of nonsense, against the models. Only what the headers announce may
// be thrown, and only where the models say so.
//
// `fuzz_native SECONDS [FIRST]` tries case FIRST, FIRST + 1, ...; a failure names its case. With clang's
// -fsanitize=fuzzer and -DFASTDIFF_LIBFUZZER it is a libFuzzer target, which needs nothing but csrc/.
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <new>
#include <numeric>
#include <stdexcept>

#include "check.hpp"
#include "order.hpp"
#include "prefetcher.hpp"
#include "row_reader.hpp"
#include "scene.hpp"
#include "stream.hpp"

using namespace fastdiff_test;
using fastdiff::Request;

namespace {

constexpr std::uint64_t kMost = std::uint64_t{1} << 62;
constexpr std::byte kUntouched{0x5A};

// Numbers from bytes; zeros behind their end.
class Source {
 public:
    Source(const std::uint8_t* data, std::size_t size) : data_(data), left_(size) {}

    std::uint64_t number(int n_bytes = 8) {
        std::uint64_t value = 0;
        for (int i = 0; i < n_bytes && left_ > 0; ++i, ++data_, --left_) value = value << 8 | *data_;
        return value;
    }
    std::uint64_t range(std::uint64_t low, std::uint64_t high) { return low + number(4) % (high - low + 1); }
    bool chance(std::uint64_t percent) { return number(1) % 100 < percent; }
    // mostly from low to high, sometimes what nobody means
    std::uint64_t wild(std::uint64_t low, std::uint64_t high) {
        if (!chance(6)) return range(low, high);
        const std::uint64_t any[] = {0, 1, kMost - 1, kMost, kMost + 1, kMost * 2 - 1, kMost * 2, ~std::uint64_t{0},
                                     number(), number(5)};
        return any[range(0, std::size(any) - 1)];
    }

 private:
    const std::uint8_t* data_;
    std::size_t left_;
};

void fuzz_order(Source& source) {
    const OrderModel model{source.wild(1, 1500), source.number(),    source.wild(1, 70),
                           source.wild(1, 3000), source.wild(0, 3), source.wild(1, 5)};
    const bool valid = model.n >= 1 && model.n <= kMost && model.block_rows >= 1 && model.block_rows <= kMost &&
                       (model.block_rows == 1 || model.pool_rows >= model.block_rows) && model.rank < model.world_size;
    std::optional<fastdiff::BlockOrder> order;
    try {
        order.emplace(model.n, model.seed, model.block_rows, model.pool_rows, model.rank, model.world_size);
    } catch (const std::invalid_argument&) {
    }
    CHECK_EQUAL(order.has_value(), valid);
    if (!valid) return;
    const std::uint64_t rows = order->rows_in_epoch(0);
    if (rows == 0) {
        std::int64_t out = 0;
        CHECK_THROWS(std::invalid_argument, order->indices(source.number(), 1, &out));
        return;
    }
    if (!order->exact() && order->largest_window() / model.block_rows > 100000) return;  // a window's blocks are listed
    Rows out(source.range(1, 50));
    if (model.n <= 1500) {
        const bool far = model.world_size == 1 && source.chance(20);  // otherwise epochs are counted one by one
        const std::uint64_t position = far ? source.number() / 2 : source.range(0, 3 * rows);
        order->indices(position, out.size(), out.data());
        CHECK(Numbers(out.begin(), out.end()) == joined(model.stream(position, out.size())));
        return;
    }
    const std::uint64_t position = source.number() % rows;
    order->indices(position, out.size(), out.data());
    for (const std::int64_t index : out) CHECK(index >= 0 && static_cast<std::uint64_t>(index) < model.n);
    if (order->exact()) return;
    const std::uint64_t w = order->window_of(0, position);
    const std::uint64_t begin = order->window_start(0, w), end = order->window_start(0, w + 1);
    CHECK(begin <= position && position < end && end <= rows && end - begin <= order->largest_window());
    CHECK_EQUAL(order->left_in_window(position), end - position);
    CHECK_EQUAL(order->window(0, w).n_rows(), end - begin);
}

// Which rows of a scene are not what they were.
struct Faults {
    std::vector<bool> unreadable, spoiled, nonfinite;
};

Scene faulty_scene(Source& source, Faults& faults, std::uint64_t most_rows) {
    Rng rng(source.number(4));
    const std::size_t row_bytes = source.chance(5) ? source.range(2000, 3000) * 2 : source.range(1, 30) * 2;
    Scene scene = random_scene(source.range(1, most_rows), row_bytes, rng);
    const auto n = static_cast<std::size_t>(scene.n());
    faults.unreadable.resize(n), faults.spoiled.resize(n), faults.nonfinite.resize(n);
    if (source.chance(40)) return scene;
    for (std::uint64_t left = source.range(0, 2); left > 0; --left) {
        const auto row = static_cast<std::int64_t>(source.range(0, n - 1));
        faults.spoiled[static_cast<std::size_t>(row)] = faults.nonfinite[static_cast<std::size_t>(row)] = true;
        scene.spoil(row, 0, {std::byte{0xFF}, std::byte{0xFF}});
    }
    if (source.chance(30)) {
        const TempFile& file = scene.files[source.range(0, scene.files.size() - 1)];
        file.truncate(source.range(0, file.size()));
    }
    for (std::size_t i = 0; i < scene.extents.size(); ++i) {
        fastdiff::Extent& extent = scene.extents[i];
        // places that the bindings let pass: from 0 to 2^63 - 1. Other bytes of the file are no fault, so: past its end
        if (source.chance(3)) extent.offset = std::max(scene.files[scene.file_of[i]].size(), source.number() >> 1);
        if (source.chance(2)) extent.fd = -1;
        for (std::int64_t row = extent.first_row; row < extent.end_row; ++row)
            faults.unreadable[static_cast<std::size_t>(row)] =
                extent.fd < 0 || scene.offset_of(row) + row_bytes > scene.files[scene.file_of[i]].size();
    }
    return scene;
}

// The rows that share a checksum with this one.
std::pair<std::int64_t, std::int64_t> block_of(const Scene& scene, std::int64_t row) {
    for (const fastdiff::FileCrc& part : scene.crc)
        if (row < part.end_row) {
            const std::int64_t first = row - (row - part.first_row) % 32;
            return {first, std::min(first + 32, part.end_row)};
        }
    fail(__FILE__, __LINE__, "no such row");
}

enum class Outcome { kRead, kUnreadable, kCorrupt };

// What reading a row gives, with the rows that must be read for its checksum.
Outcome outcome(const Scene& scene, const Faults& faults, std::int64_t row, bool checked) {
    if (!checked) return faults.unreadable[static_cast<std::size_t>(row)] ? Outcome::kUnreadable : Outcome::kRead;
    const auto [first, end] = block_of(scene, row);
    Outcome found = Outcome::kRead;
    for (auto r = static_cast<std::size_t>(first); r < static_cast<std::size_t>(end); ++r) {
        if (faults.unreadable[r]) return Outcome::kUnreadable;
        if (faults.spoiled[r]) found = Outcome::kCorrupt;
    }
    return found;
}

void fuzz_reader(Source& source) {
    Faults faults;
    const Scene scene = faulty_scene(source, faults, 400);
    const std::size_t row_bytes = scene.row_bytes;
    const bool checked = source.chance(50), sorted = source.chance(70);
    const fastdiff::RowReader reader = scene.reader(checked);
    const auto n = static_cast<std::uint64_t>(scene.n());
    Rows rows;
    const std::uint64_t at = source.range(0, n - 1), skips = source.range(0, 60);
    for (std::uint64_t row = at, left = source.range(0, 500); left > 0 && row < n; --left) {
        rows.push_back(static_cast<std::int64_t>(row));
        row += source.chance(skips) ? source.range(0, 5) : 1;
    }
    bool outside = false;
    if (source.chance(5)) {
        rows.push_back(static_cast<std::int64_t>(source.number()));
        outside = rows.back() < 0 || rows.back() >= scene.n();
    }
    std::sort(rows.begin(), rows.end());
    std::vector<std::uint64_t> slots(rows.size() + source.range(0, 3));
    std::iota(slots.begin(), slots.end(), 0);
    if (!sorted) {
        slots.resize(rows.size());
        for (std::size_t i = 1; i < slots.size(); ++i) std::swap(slots[i], slots[source.range(0, i)]);
    }
    Bytes out((slots.size() + 1) * row_bytes, kUntouched), expected = out;
    std::vector<Request> requests;
    for (std::size_t i = 0; i < rows.size(); ++i) requests.push_back({rows[i], slots[i]});

    Outcome wanted = Outcome::kRead;
    std::int64_t bad = 0;
    for (std::size_t i = 0; !outside && i < rows.size() && wanted == Outcome::kRead; ++i) {
        wanted = outcome(scene, faults, rows[i], checked);
        bad = rows[i];
    }
    const auto compare = [&](std::int64_t end) {  // rows below `end` are there
        for (const Request& r : requests)
            if (r.row < end && !faults.spoiled[static_cast<std::size_t>(r.row)])
                CHECK(std::memcmp(out.data() + r.slot * row_bytes, scene.row(r.row), row_bytes) == 0);
    };
    try {
        reader.read(requests.data(), requests.size(), out.data());
        CHECK(!outside && wanted == Outcome::kRead);
        compare(scene.n());
        std::vector<bool> used(slots.size() + 1);
        for (const Request& r : requests) used[r.slot] = true;
        for (std::size_t i = 0; i < out.size(); ++i) CHECK(used[i / row_bytes] || out[i] == kUntouched);
    } catch (const std::out_of_range&) {
        CHECK(outside);
        CHECK(out == expected);
    } catch (const fastdiff::ReadError& error) {
        CHECK(wanted == Outcome::kUnreadable);
        CHECK(error.extent < scene.extents.size() && error.got < error.wanted);
        CHECK_EQUAL(error.wanted, static_cast<std::uint64_t>(error.end_row - error.row) * row_bytes);
        if (checked) {
            CHECK(block_of(scene, error.row) == block_of(scene, bad));
            compare(block_of(scene, bad).first);
        } else {
            CHECK(error.row <= bad && bad < error.end_row);
            compare(error.row);
        }
    } catch (const fastdiff::CorruptRows& error) {
        CHECK(wanted == Outcome::kCorrupt);
        CHECK(std::pair(error.row, error.end_row) == block_of(scene, bad));
        compare(error.row);
    }

    // the same in the order of the slots, by several threads: one of the faults
    Rows by_slot(rows.size());
    if (slots.size() != rows.size()) return;
    for (const Request& r : requests) by_slot[r.slot] = r.row;
    out = expected;
    try {
        fastdiff::gather_rows(reader, by_slot.data(), by_slot.size(), out.data(),
                              static_cast<unsigned>(source.range(0, 4)));
        CHECK(!outside && wanted == Outcome::kRead);
        compare(scene.n());
    } catch (const std::out_of_range&) {
        CHECK(outside);
    } catch (const fastdiff::RowError& error) {
        CHECK(wanted != Outcome::kRead && error.row < scene.n());
    }
}

void fuzz_stream(Source& source) {
    constexpr unsigned __int128 kSmallPool = 32 << 20, kHugePool = static_cast<unsigned __int128>(1) << 48;
    constexpr std::uint64_t kTaken = 300;
    Faults faults;
    const Scene scene = faulty_scene(source, faults, source.chance(10) ? 4000 : 500);
    Rng rng(source.number(4));
    Stream stream = random_stream(scene, source.chance(50), rng);
    const bool one_rank = stream.order.world_size == 1;
    stream.options.batch_rows = source.wild(1, 150);
    stream.options.n_slots = source.wild(1, 4);
    stream.options.count = source.wild(1, 2 * stream.order.n);
    stream.options.start = one_rank ? source.wild(0, 2 * stream.order.n) : source.range(0, 2 * stream.order.n);
    if (stream.options.count > kMost || stream.options.start > kMost) return;  // the last position must fit 64 bits
    const bool exact = stream.order.block_rows == 1;
    const fastdiff::BlockOrder order(stream.order.n, 0, stream.order.block_rows, stream.order.pool_rows,
                                     stream.order.rank, stream.order.world_size);
    const bool nothing =
        stream.options.batch_rows == 0 || stream.options.n_slots == 0 || stream.options.count == 0;
    const std::uint64_t batch = std::min(stream.options.batch_rows, stream.options.count);
    const std::uint64_t slot_rows = exact ? batch : order.largest_window();
    // below 2^128: each factor but the last is less than 2^63
    const unsigned __int128 slot_bytes = static_cast<unsigned __int128>(slot_rows) * scene.row_bytes;
    const bool huge = slot_bytes >= kHugePool || slot_bytes * std::min(stream.options.n_slots, kMost) >= kHugePool;
    if (!nothing && !huge && (slot_bytes * stream.options.n_slots > kSmallPool || stream.options.n_slots > 1000))
        return;  // that memory might well be had
    try {
        const auto prefetcher = stream.open(scene);
        CHECK(!nothing && !huge);
    } catch (const std::invalid_argument&) {
        CHECK(nothing);
    } catch (const std::bad_alloc&) {
        CHECK(huge);
    }
    if (nothing || huge) return;

    // what will be taken, and what is read for it
    const std::uint64_t wanted = std::min(stream.options.count, kTaken);
    Stream covered = stream;
    covered.options.count = exact ? std::min(stream.options.count, (wanted + batch - 1) / batch * batch) : wanted;
    std::size_t n_before = 0;
    bool failing = false;
    Rows expected;
    for (const ExpectedSlot& slot : covered.slots()) {
        for (const std::int64_t row : slot.read)
            failing = failing || outcome(scene, faults, row, stream.checked) != Outcome::kRead ||
                      (stream.options.finite && faults.nonfinite[static_cast<std::size_t>(row)]);
        if (failing) break;
        n_before += slot.taken.size();
        expected.insert(expected.end(), slot.taken.begin(), slot.taken.end());
    }
    if (!failing) expected.resize(wanted);
    std::string first;
    for (const unsigned n_threads : {1u, static_cast<unsigned>(source.range(2, 5))}) {
        stream.options.n_threads = n_threads;
        const auto prefetcher = stream.open(scene);
        std::size_t n_came = 0;
        std::string how;
        while (n_came < wanted && how.empty()) {
            try {
                const Prefetcher::View view = take(*prefetcher, std::min(source.range(1, 100), wanted - n_came));
                CHECK(view.n_rows > 0 && n_came + view.n_rows <= expected.size());
                for (std::size_t i = 0; i < view.n_rows; ++i)
                    if (!faults.spoiled[static_cast<std::size_t>(expected[n_came + i])])
                        check_rows(scene, {view.slot, view.data + i * scene.row_bytes, 1}, &expected[n_came + i]);
                n_came += view.n_rows;
                prefetcher->release(view.slot);
            } catch (const fastdiff::RowError& error) {
                how = "row " + std::to_string(error.row);
            }
        }
        CHECK_EQUAL(failing, !how.empty());
        CHECK_EQUAL(n_came, expected.size());
        if (n_threads == 1) first = how;
        CHECK_EQUAL(how, first);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Source source(data, size);
    switch (source.number(1) % 3) {
        case 0: fuzz_order(source); break;
        case 1: fuzz_reader(source); break;
        default: fuzz_stream(source);
    }
    return 0;
}

#ifndef FASTDIFF_LIBFUZZER
namespace {

std::uint64_t current = 0;

extern "C" void tell_case(int signal) {
    char text[64];
    const int n = std::snprintf(text, sizeof text, "signal %d in case %llu\n", signal,
                                static_cast<unsigned long long>(current));
    if (::write(2, text, static_cast<std::size_t>(n)) < 0) std::_Exit(2);
    std::_Exit(1);
}

}  // namespace

int main(int argc, char** argv) {
    const double seconds = argc > 1 ? std::atof(argv[1]) : 1;
    const std::uint64_t first = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 0;
    for (const int signal : {SIGABRT, SIGALRM}) std::signal(signal, tell_case);
    const auto began = std::chrono::steady_clock::now();
    const std::chrono::duration<double> limit(seconds);
    for (current = first; std::chrono::steady_clock::now() - began < limit; ++current) {
        Rng rng(current);
        std::vector<std::uint8_t> bytes(rng.range(0, 3000));
        for (std::uint8_t& byte : bytes) byte = static_cast<std::uint8_t>(rng.next() >> 32);
        ::alarm(kTestSeconds);
        LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
    }
    ::alarm(0);
    std::printf("cases %llu to %llu passed\n", static_cast<unsigned long long>(first),
                static_cast<unsigned long long>(current) - 1);
}
#endif
