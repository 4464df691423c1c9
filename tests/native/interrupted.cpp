// Stands before preadv and operator new of csrc/ and the tests (linked with --wrap), for what hardly ever happens.
#include "interrupted.hpp"

#include <sys/uio.h>

#include <atomic>
#include <cerrno>
#include <new>
#include <vector>

#include "scene.hpp"

namespace {

std::atomic<std::size_t> failing_bytes{0};
std::atomic<std::int64_t> n_until_failure{-1};

}  // namespace

namespace fastdiff_test {

FailingAllocation::FailingAllocation(std::int64_t n_before, std::size_t n_bytes) {
    failing_bytes = n_bytes;
    n_until_failure = n_before;
}

FailingAllocation::~FailingAllocation() { n_until_failure = -1; }

}  // namespace fastdiff_test

extern "C" void* __real__Znwm(std::size_t n_bytes);

extern "C" void* __wrap__Znwm(std::size_t n_bytes) {
    if (n_until_failure.load(std::memory_order_relaxed) >= 0 && (failing_bytes == 0 || failing_bytes == n_bytes) &&
        n_until_failure.fetch_sub(1) == 0)
        throw std::bad_alloc();
    return __real__Znwm(n_bytes);
}

extern "C" ssize_t __real_preadv(int fd, const iovec* pieces, int n_pieces, off_t offset);

// A read is interrupted, or brings fewer bytes than it was asked for. What cannot be read stays so.
extern "C" ssize_t __wrap_preadv(int fd, const iovec* pieces, int n_pieces, off_t offset) {
    static std::atomic<std::uint64_t> n_calls{0};
    fastdiff_test::Rng rng(n_calls.fetch_add(1, std::memory_order_relaxed));
    if (rng.chance(10)) {
        errno = EINTR;
        return -1;
    }
    if (!rng.chance(30) || (::fcntl(fd, F_GETFL) & O_DIRECT) != 0)  // parts of sectors do not come past the page cache
        return __real_preadv(fd, pieces, n_pieces, offset);
    std::vector<iovec> fewer(pieces, pieces + rng.range(1, static_cast<std::uint64_t>(n_pieces)));
    fewer.back().iov_len = rng.range(1, fewer.back().iov_len);
    return __real_preadv(fd, fewer.data(), static_cast<int>(fewer.size()), offset);
}
