// File descriptors of a reader's own, and what can be known about the files before reading.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "row_reader.hpp"

namespace fastdiff {

// The files of some extents, opened a second time: how they are read here changes nothing for the first descriptors,
// and they may be closed.
class Files {
 public:
    // Replaces each extent's fd by one of its own; `direct` bypasses the page cache. Throws std::system_error.
    Files(std::vector<Extent>& extents, bool direct);
    ~Files();
    Files(const Files&) = delete;
    Files& operator=(const Files&) = delete;

 private:
    std::vector<int> fds_;
};

// Why rows cannot be read past the page cache (O_DIRECT), or nothing if they can.
std::optional<std::string> why_not_direct(const std::vector<Extent>& extents, std::size_t row_bytes);

// Share of 64 rows, spread over the store, that the page cache holds; 0 of files of others, of which the kernel does
// not say. Nothing is read for it.
double cached_share(const std::vector<Extent>& extents, std::size_t row_bytes);

}  // namespace fastdiff
