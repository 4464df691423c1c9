// Memory that readers fill and batches are views of: page-aligned, in huge pages where the kernel has them, and there
// from the start, so that a batch never waits for a page and too small a machine shows at once.
#pragma once

#include <cstddef>

namespace fastdiff {

class Pool {
 public:
    // Throws std::bad_alloc if the memory cannot be had.
    explicit Pool(std::size_t n_bytes);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    std::byte* data() const { return data_; }
    std::size_t size() const { return size_; }

 private:
    std::byte* data_;
    std::size_t size_;
};

}  // namespace fastdiff
