#include "files.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <system_error>
#include <unordered_map>

#include "permutation.hpp"

namespace fastdiff {

namespace {

constexpr std::size_t kSector = 512;  // the least that a disk addresses
constexpr std::size_t kPage = 4096;
constexpr std::uint64_t kSamples = 64;

int open_again(int fd, int flags) {
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | flags);
}

bool may_ask(int fd) {
    struct stat facts;
    const std::string path = "/proc/self/fd/" + std::to_string(fd);
    return (::fstat(fd, &facts) == 0 && facts.st_uid == ::geteuid()) ||
           ::faccessat(AT_FDCWD, path.c_str(), W_OK, AT_EACCESS) == 0;
}

}  // namespace

Files::Files(std::vector<Extent>& extents, bool direct) {
    std::unordered_map<int, int> mine;
    for (Extent& extent : extents) {
        const auto [found, is_new] = mine.try_emplace(extent.fd, -1);
        if (is_new) {
            found->second = open_again(extent.fd, direct ? O_DIRECT : 0);
            if (found->second < 0) {
                const int error = errno;
                for (const int fd : fds_) ::close(fd);
                throw std::system_error(error, std::generic_category(), "cannot open a file again");
            }
            fds_.push_back(found->second);
            // blocks in random order: what the kernel reads ahead is not what comes next
            if (!direct) ::posix_fadvise(found->second, 0, 0, POSIX_FADV_RANDOM);
        }
        extent.fd = found->second;
    }
}

Files::~Files() {
    for (const int fd : fds_) ::close(fd);
}

std::optional<std::string> why_not_direct(const std::vector<Extent>& extents, std::size_t row_bytes) {
    if (row_bytes % kSector != 0)
        return "a row has " + std::to_string(row_bytes) + " bytes, not a multiple of " + std::to_string(kSector);
    for (const Extent& extent : extents)
        if (extent.offset % kSector != 0)
            return "rows begin at byte " + std::to_string(extent.offset) + ", not a multiple of " +
                   std::to_string(kSector);
    // whether the file system and the disk can: try it, at the addresses and offsets of a second row
    const std::unique_ptr<std::byte[]> memory(new std::byte[row_bytes + 2 * kPage]);
    std::byte* page = memory.get() + -reinterpret_cast<std::uintptr_t>(memory.get()) % kPage;
    int last = -1;
    for (const Extent& extent : extents) {
        if (extent.fd == last) continue;
        last = extent.fd;
        const int fd = open_again(extent.fd, O_DIRECT);
        if (fd < 0) return std::string("the file system refuses it (") + std::strerror(errno) + ")";
        const bool second = extent.end_row - extent.first_row > 1;
        const ssize_t n = ::pread(fd, page + row_bytes % kPage, row_bytes,
                                  static_cast<off_t>(extent.offset + (second ? row_bytes : 0)));
        const int error = errno;
        ::close(fd);
        if (n < 0) return std::string("the disk refuses it (") + std::strerror(error) + ")";
    }
    return std::nullopt;
}

double cached_share(const std::vector<Extent>& extents, std::size_t row_bytes) {
    if (extents.empty() || extents.back().end_row == 0) return 0;
    const auto n_rows = static_cast<std::uint64_t>(extents.back().end_row);
    const std::uint64_t n = std::min(n_rows, kSamples);
    const Permutation spread(n_rows, 0, 0);
    const auto page = static_cast<std::uint64_t>(::sysconf(_SC_PAGESIZE));
    // of a file that one may not write, Linux says that all of it is there
    if (!may_ask(extents.front().fd)) return 0;
    std::uint64_t cached = 0;
    for (std::uint64_t i = 0; i < n; ++i) {
        const auto number = static_cast<std::int64_t>(spread(i));
        const auto extent = std::upper_bound(extents.begin(), extents.end(), number,
                                             [](std::int64_t r, const Extent& e) { return r < e.end_row; });
        const std::uint64_t at = extent->offset + static_cast<std::uint64_t>(number - extent->first_row) * row_bytes;
        // a mapping is only asked about, never touched: preadv2(RWF_NOWAIT) would start to read what it does not find
        void* there = ::mmap(nullptr, page, PROT_READ, MAP_SHARED, extent->fd, static_cast<off_t>(at / page * page));
        if (there == MAP_FAILED) continue;
        unsigned char resident = 0;
        cached += ::mincore(there, page, &resident) == 0 && (resident & 1) != 0;
        ::munmap(there, page);
    }
    return static_cast<double>(cached) / static_cast<double>(n);
}

}  // namespace fastdiff
