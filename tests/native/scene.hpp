// A store whose every byte is known: extents strewn over several files, with other bytes around them.
#pragma once

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "check.hpp"
#include "crc32c.hpp"
#include "model.hpp"
#include "row_reader.hpp"

namespace fastdiff_test {

using Bytes = std::vector<std::byte>;
using Rows = std::vector<std::int64_t>;

// Numbers from a seed: the same on every machine, so that a failure comes again.
class Rng {
 public:
    explicit Rng(std::uint64_t seed) : state_(mix(seed)) {}
    std::uint64_t next() { return state_ = mix(state_); }
    // from low to high, both included
    std::uint64_t range(std::uint64_t low, std::uint64_t high) { return low + next() % (high - low + 1); }
    // in [begin, end)
    std::int64_t row(std::int64_t begin, std::int64_t end) {
        return begin + static_cast<std::int64_t>(range(0, static_cast<std::uint64_t>(end - begin) - 1));
    }
    bool chance(std::uint64_t percent) { return range(1, 100) <= percent; }

 private:
    std::uint64_t state_;
};

// A file without a name, which is gone when it is closed.
class TempFile {
 public:
    TempFile() {
        const char* folder = std::getenv("TMPDIR");
        std::string path = std::string(folder == nullptr ? "/tmp" : folder) + "/fastdiff-native-XXXXXX";
        fd_ = ::mkstemp(path.data());
        CHECK(fd_ >= 0);
        CHECK(::unlink(path.c_str()) == 0);
    }
    TempFile(TempFile&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    TempFile& operator=(TempFile&&) = delete;
    ~TempFile() {
        if (fd_ >= 0) ::close(fd_);
    }

    int fd() const { return fd_; }
    void write(const Bytes& bytes, std::uint64_t offset = 0) const {
        CHECK(::pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(offset)) ==
              static_cast<ssize_t>(bytes.size()));
    }
    void truncate(std::uint64_t size) const { CHECK(::ftruncate(fd_, static_cast<off_t>(size)) == 0); }
    std::uint64_t size() const { return static_cast<std::uint64_t>(::lseek(fd_, 0, SEEK_END)); }

 private:
    int fd_;
};

struct Scene {
    std::size_t row_bytes = 0;
    std::vector<TempFile> files;
    std::vector<std::size_t> file_of;  // of each extent
    std::vector<fastdiff::Extent> extents;
    Bytes rows;  // all of them, one after another
    std::vector<std::uint32_t> sums;
    std::vector<fastdiff::FileCrc> crc;  // over stretches that have nothing to do with the extents

    std::int64_t n() const { return extents.empty() ? 0 : extents.back().end_row; }
    const std::byte* row(std::int64_t number) const {
        return rows.data() + static_cast<std::size_t>(number) * row_bytes;
    }
    std::size_t extent_of(std::int64_t number) const {
        std::size_t i = 0;
        while (extents[i].end_row <= number) ++i;
        return i;
    }
    std::uint64_t offset_of(std::int64_t number) const {
        const fastdiff::Extent& extent = extents[extent_of(number)];
        return extent.offset + static_cast<std::uint64_t>(number - extent.first_row) * row_bytes;
    }
    const TempFile& file(std::int64_t number) const { return files[file_of[extent_of(number)]]; }

    // Writes other bytes at byte `at` of a row.
    void spoil(std::int64_t number, std::size_t at, const Bytes& bytes) const {
        file(number).write(bytes, offset_of(number) + at);
    }
    void flip(std::int64_t number, std::size_t byte, unsigned bit) const {
        spoil(number, byte, {row(number)[byte] ^ std::byte{static_cast<unsigned char>(1u << bit)}});
    }
    void mend(std::int64_t number) const { spoil(number, 0, Bytes(row(number), row(number) + row_bytes)); }

    fastdiff::RowReader reader(bool checked = false) const {
        fastdiff::RowReader made(extents, row_bytes);
        if (checked) made.check(crc);
        return made;
    }
};

struct SceneOptions {
    std::size_t row_bytes = 8;
    std::size_t n_files = 3;
    std::vector<std::uint64_t> extent_rows;
    std::uint64_t alignment = 1;  // of the extents in their files
};

// Rows hold no NaN and no infinity, whatever type they are read as: no byte has bit 6 set.
inline Scene make_scene(const SceneOptions& options, Rng& rng) {
    Scene scene;
    scene.row_bytes = options.row_bytes;
    std::vector<Bytes> images(options.n_files);
    const auto pad = [&](Bytes& image, std::uint64_t n) { image.resize(image.size() + n, std::byte{0xEE}); };
    std::int64_t first = 0;
    for (const std::uint64_t n_rows : options.extent_rows) {
        const std::size_t number = rng.range(0, options.n_files - 1);
        Bytes& image = images[number];
        if (rng.chance(70)) pad(image, rng.range(1, 3000));
        pad(image, (options.alignment - image.size() % options.alignment) % options.alignment);
        const auto end = first + static_cast<std::int64_t>(n_rows);
        scene.extents.push_back({-1, image.size(), first, end});
        scene.file_of.push_back(number);
        const std::size_t begin = scene.rows.size(), n_bytes = n_rows * options.row_bytes;
        scene.rows.resize(begin + n_bytes);
        for (std::size_t at = 0; at < n_bytes; at += sizeof(std::uint64_t)) {
            const std::uint64_t word = rng.next() & 0xBFBFBFBFBFBFBFBFu;
            std::memcpy(scene.rows.data() + begin + at, &word, std::min(sizeof word, n_bytes - at));
        }
        image.insert(image.end(), scene.rows.begin() + static_cast<std::ptrdiff_t>(begin), scene.rows.end());
        first = end;
    }
    for (Bytes& image : images) {
        pad(image, rng.range(0, 3) * 100);
        scene.files.emplace_back();
        scene.files.back().write(image);
    }
    for (std::size_t i = 0; i < scene.extents.size(); ++i) scene.extents[i].fd = scene.files[scene.file_of[i]].fd();

    scene.sums.reserve(static_cast<std::size_t>(first) + 1);  // the pointers must last
    for (std::int64_t begin = 0; begin < first;) {
        const std::int64_t end = std::min(first, begin + static_cast<std::int64_t>(rng.range(1, 300)));
        scene.crc.push_back({begin, end, scene.sums.data() + scene.sums.size()});
        for (std::int64_t at = begin; at < end; at += fastdiff::kCrcRows) {
            const auto n_rows = static_cast<std::size_t>(std::min(fastdiff::kCrcRows, end - at));
            scene.sums.push_back(fastdiff::crc32c(0, scene.row(at), n_rows * options.row_bytes));
        }
        begin = end;
    }
    return scene;
}

// About `n` rows in extents of all sizes, among them empty ones and single rows.
inline Scene random_scene(std::uint64_t n, std::size_t row_bytes, Rng& rng) {
    SceneOptions options;
    options.row_bytes = row_bytes;
    options.n_files = rng.range(1, 4);
    std::uint64_t left = n;
    while (left > 0) {
        const std::uint64_t kind = rng.range(0, 3);
        const std::uint64_t most = kind < 2 ? kind : kind == 2 ? 20 : std::max<std::uint64_t>(n / 2, 1);
        options.extent_rows.push_back(std::min(rng.range(std::min<std::uint64_t>(kind, 1), most), left));
        left -= options.extent_rows.back();
    }
    if (rng.chance(30)) options.extent_rows.push_back(0);
    return make_scene(options, rng);
}

}  // namespace fastdiff_test
