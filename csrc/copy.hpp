// Copying to memory that this core will not read soon.
#pragma once

#include <cstddef>

namespace fastdiff {

// memcpy past the processor's caches, where it can: a store that first fetches the line it replaces costs a third of the
// bandwidth of the memory. What was copied is ordered by `flush_copies`, before another thread is told about it.
void copy_past_caches(std::byte* to, const std::byte* from, std::size_t n);
void flush_copies();

}  // namespace fastdiff
