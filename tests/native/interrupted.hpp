// What may happen at any time and hardly ever does. Reads are interrupted always, memory fails on demand.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff_test {

// While it lives, one operator new of csrc/ or the tests throws std::bad_alloc: the one after `n_before` others. With
// `n_bytes` only those that ask for as many count.
class FailingAllocation {
 public:
    explicit FailingAllocation(std::int64_t n_before, std::size_t n_bytes = 0);
    ~FailingAllocation();
    FailingAllocation(const FailingAllocation&) = delete;
    FailingAllocation& operator=(const FailingAllocation&) = delete;
};

}  // namespace fastdiff_test
