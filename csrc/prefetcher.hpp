// Shuffled rows, read ahead: threads fill the slots of a ring, window after window, and a consumer takes them in order.
//
// A slot holds one window (order.hpp), in the exact order one batch. Its rows are scattered to their shuffled places, so
// that what the consumer takes is a view. From a disk they are read straight there (`in_place`). From the page cache they
// go by way of a small buffer in the processor's cache, where they are looked at for NaN, and on past it: that was 5 %
// faster, with the look for NaN 40 %, although each byte is copied twice. A slot is filled anew only when all
// views into it are released: that is the back-pressure, and the memory is the ring and nothing else.
//
// The rows that come depend on the order alone, never on the number of threads or slots. A fault comes with the first
// row of the window it is in, and of several faults in a window the one with the lowest row.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "order.hpp"
#include "pool.hpp"
#include "row_reader.hpp"
#include "threads.hpp"

namespace fastdiff {

struct PrefetchOptions {
    std::uint64_t start = 0;         // first position of the stream
    std::uint64_t count = 0;         // positions that will be taken
    std::uint64_t batch_rows = 1;    // rows in a slot, in the exact order
    std::size_t n_slots = 2;
    unsigned n_threads = 1;
    std::optional<Dtype> finite;     // look for NaN and infinity in values of this type
    bool in_place = false;           // read rows to their places, not by way of a buffer in the processor's cache
};

// Nothing can come any more: the consumer holds views of every slot.
class HeldTooLong : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

class Prefetcher {
 public:
    // `table`, if given, has the row of each index of the order and outlives the prefetcher; without it they are equal.
    // Throws std::invalid_argument if there are no rows, bad_alloc if there is no memory.
    Prefetcher(RowReader reader, BlockOrder order, const std::int64_t* table, PrefetchOptions options);
    ~Prefetcher();
    Prefetcher(const Prefetcher&) = delete;
    Prefetcher& operator=(const Prefetcher&) = delete;

    // Rows the pool needs for n_slots slots.
    static std::size_t slot_rows(const BlockOrder& order, const PrefetchOptions& options);

    struct View {
        std::size_t slot;
        std::byte* data;
        std::size_t n_rows;
    };

    // The next rows, at most `n` and fewer only where a slot or the stream ends. Waits up to `seconds`; nothing if none
    // came in that time. Throws HeldTooLong if none can come until a view is released, and what went wrong in reading
    // them; after that the prefetcher is of no use.
    // To be called from one thread at a time, while rows are left. Every view must be released once.
    std::optional<View> take(std::size_t n, double seconds);
    void release(std::size_t slot);

    // Ends the threads. Views stay valid.
    void stop();

    const std::shared_ptr<Pool>& pool() const { return pool_; }

 private:
    struct Slot {
        std::uint64_t sequence = 0;  // which window of the stream, from 1 on; 0 for none yet
        std::uint64_t n_rows = 0;
        std::uint64_t n_tasks = 0, n_claimed = 0, n_done = 0;
        std::optional<Window> window;    // in block order
        std::uint64_t position = 0;      // in exact order: of its first row
        std::exception_ptr failure;
        std::pair<std::int64_t, std::uint64_t> failed;  // row and task of it
        std::size_t n_views = 0;
        bool consumed = true;

        bool ready() const { return n_done == n_tasks; }
        bool free() const { return consumed && n_views == 0; }
    };

    void work();
    bool open_slot();  // the next window begins to be read, if there is one and a slot is free; lock held
    void requests(const Slot& slot, std::uint64_t task, std::vector<Request>& out) const;
    // Reads rows to their places and looks at them. Throws RowError.
    void read(const std::vector<Request>& wanted, std::byte* to, std::vector<std::byte>& buffer) const;
    std::int64_t row(std::int64_t index) const { return table_ == nullptr ? index : table_[index]; }

    RowReader reader_;
    BlockOrder order_;
    const std::int64_t* table_;
    PrefetchOptions options_;
    std::uint64_t task_rows_;
    std::size_t slot_bytes_;
    std::shared_ptr<Pool> pool_;

    std::mutex mutex_;
    std::condition_variable slot_freed_, slot_filled_;
    std::vector<Slot> slots_;
    std::uint64_t n_opened_ = 0;             // windows begun
    BlockOrder::Place next_{0, 0};           // block order: the window that is begun next
    std::uint64_t next_window_ = 0;
    std::uint64_t position_;                 // stream position at which the next window begins
    std::uint64_t end_;                      // stream position behind the last wanted one
    bool stopped_ = false;
    std::exception_ptr broken_;              // why no further window can come

    std::uint64_t current_ = 1;              // the consumer's window
    std::uint64_t taken_ = 0;                // rows of it already taken
    std::uint64_t left_;                     // rows still to be taken
    Threads threads_;
};

}  // namespace fastdiff
