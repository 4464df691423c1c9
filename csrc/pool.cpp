#include "pool.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <new>

#ifndef MADV_POPULATE_WRITE
#define MADV_POPULATE_WRITE 23  // Linux 5.14
#endif

namespace fastdiff {

Pool::Pool(std::size_t n_bytes) : size_(n_bytes) {
    void* memory =
        n_bytes == 0 ? MAP_FAILED : ::mmap(nullptr, n_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(memory);
    ::madvise(memory, n_bytes, MADV_HUGEPAGE);  // only for speed: no harm where it fails
    if (::madvise(memory, n_bytes, MADV_POPULATE_WRITE) == 0) return;
    if (errno != EINVAL) {
        ::munmap(memory, n_bytes);
        throw std::bad_alloc();
    }
    // an older kernel: touch every page
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    for (std::size_t at = 0; at < n_bytes; at += page) const_cast<volatile std::byte&>(data_[at]) = std::byte{0};
}

Pool::~Pool() { ::munmap(data_, size_); }

}  // namespace fastdiff
