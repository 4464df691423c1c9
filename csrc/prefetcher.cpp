#include "prefetcher.hpp"

#include <algorithm>
#include <chrono>
#include <limits>
#include <new>
#include <string>
#include <utility>

#include "copy.hpp"

namespace fastdiff {

namespace {

// What one thread reads at a time. Large enough that taking it costs nothing, small enough that the threads of a window
// end together.
constexpr std::size_t kBlockTaskBytes = std::size_t{2} << 20;
constexpr std::size_t kBlockTaskRows = 1024;
constexpr std::size_t kBufferBytes = std::size_t{288} << 10;  // fits a cache of 512 KiB with room for what is copied
constexpr std::size_t kExactTaskRows = 32;  // rows lie apart: a disk wants many threads waiting, each for one row

std::uint64_t rows_of_task(const BlockOrder& order, std::size_t row_bytes, std::uint64_t block_rows) {
    if (order.exact()) return kExactTaskRows;
    const std::uint64_t rows = std::clamp<std::uint64_t>(kBlockTaskBytes / row_bytes, 1, kBlockTaskRows);
    return std::max<std::uint64_t>(rows / block_rows, 1) * block_rows;
}

}  // namespace

std::size_t Prefetcher::slot_rows(const BlockOrder& order, const PrefetchOptions& options) {
    return order.exact() ? std::min(options.batch_rows, options.count) : order.largest_window();
}

Prefetcher::Prefetcher(RowReader reader, BlockOrder order, const std::int64_t* table, PrefetchOptions options)
    : reader_(std::move(reader)), order_(order), table_(table), options_(options), left_(options.count) {
    if (order_.rows_in_epoch(0) == 0 || options_.count == 0 || options_.batch_rows == 0 || options_.n_slots == 0 ||
        options_.n_threads == 0 || reader_.row_bytes() == 0)
        throw std::invalid_argument("there must be rows, a batch size, slots and threads");
    if (options_.start + options_.count < options_.start) throw std::invalid_argument("the stream ends past 2^64");
    task_rows_ = rows_of_task(order_, reader_.row_bytes(), order_.block_rows());
    std::size_t pool_bytes = 0;
    if (__builtin_mul_overflow(slot_rows(order_, options_), reader_.row_bytes(), &slot_bytes_) ||
        __builtin_mul_overflow(options_.n_slots, slot_bytes_, &pool_bytes))
        throw std::bad_alloc();
    pool_ = std::make_shared<Pool>(pool_bytes);
    slots_.resize(options_.n_slots);
    position_ = options_.start;
    end_ = options_.start + options_.count;
    if (!order_.exact()) {
        next_ = order_.locate(position_);
        next_window_ = order_.window_of(next_.epoch, next_.row);
        taken_ = next_.row - order_.window_start(next_.epoch, next_window_);
    }
    try {
        for (unsigned i = 0; i < options_.n_threads; ++i) threads_.start([this] { work(); });
    } catch (...) {
        stop();
        throw;
    }
}

Prefetcher::~Prefetcher() { stop(); }

void Prefetcher::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
    }
    slot_freed_.notify_all();
    slot_filled_.notify_all();
    threads_.join();
}

bool Prefetcher::open_slot() {
    Slot& slot = slots_[n_opened_ % slots_.size()];
    if (position_ >= end_ || !slot.free()) return false;
    slot = Slot();
    if (order_.exact()) {
        slot.n_rows = std::min(options_.batch_rows, end_ - position_);
        slot.position = position_;
        position_ += slot.n_rows;
    } else {
        slot.window.emplace(order_.window(next_.epoch, next_window_));
        slot.n_rows = slot.window->n_rows();
        position_ += slot.n_rows - (n_opened_ == 0 ? taken_ : 0);
        if (++next_window_ == order_.n_windows()) {
            ++next_.epoch;
            next_window_ = 0;
        }
    }
    slot.n_tasks = (slot.n_rows + task_rows_ - 1) / task_rows_;
    slot.consumed = false;
    slot.sequence = ++n_opened_;
    return true;
}

void Prefetcher::requests(const Slot& slot, std::uint64_t task, std::vector<Request>& out) const {
    const std::uint64_t begin = task * task_rows_, end = std::min(begin + task_rows_, slot.n_rows);
    out.resize(end - begin);
    if (slot.window) {
        for (std::uint64_t i = begin; i < end; ++i)
            out[i - begin] = {row(static_cast<std::int64_t>(slot.window->index(i))), slot.window->position_of(i)};
        if (table_ == nullptr) return;  // ascending already
    } else {
        std::vector<std::int64_t> indices(end - begin);
        order_.indices(slot.position + begin, indices.size(), indices.data());
        for (std::uint64_t i = begin; i < end; ++i) out[i - begin] = {row(indices[i - begin]), i};
    }
    std::sort(out.begin(), out.end(), [](const Request& a, const Request& b) { return a.row < b.row; });
}

void Prefetcher::read(const std::vector<Request>& wanted, std::byte* to, std::vector<std::byte>& buffer) const {
    const std::size_t row_bytes = reader_.row_bytes();
    std::size_t most = options_.in_place ? wanted.size() : std::max<std::size_t>(kBufferBytes / row_bytes, 1);
    // whole blocks of the checksums: each part of one would read all of it
    if (reader_.checks()) most = std::max<std::size_t>(most / kCrcRows, 1) * kCrcRows;
    if (!options_.in_place) buffer.resize(std::min(most, wanted.size()) * row_bytes);
    std::byte* there = options_.in_place ? to : buffer.data();
    std::vector<Request> part;
    for (std::size_t begin = 0; begin < wanted.size(); begin += most) {
        const auto first = wanted.begin() + static_cast<std::ptrdiff_t>(begin);
        part.assign(first, first + static_cast<std::ptrdiff_t>(std::min(most, wanted.size() - begin)));
        if (!options_.in_place)
            for (std::size_t i = 0; i < part.size(); ++i) part[i].slot = i;
        // rows come in ascending order: those below a row that cannot be read are there
        const auto refuse_nonfinite = [&](std::int64_t end) {
            if (!options_.finite) return;
            for (const Request& r : part)
                if (r.row < end && first_nonfinite(there + r.slot * row_bytes, 1, row_bytes, *options_.finite) == 0)
                    throw NonFiniteRow(r.row);
        };
        try {
            reader_.read(part.data(), part.size(), there);
        } catch (const RowError& error) {
            refuse_nonfinite(error.row);
            throw;
        }
        refuse_nonfinite(std::numeric_limits<std::int64_t>::max());
        if (options_.in_place) continue;
        for (std::size_t i = 0; i < part.size(); ++i)
            copy_past_caches(to + wanted[begin + i].slot * row_bytes, there + i * row_bytes, row_bytes);
    }
    flush_copies();
}

void Prefetcher::work() {
    std::vector<Request> wanted;
    std::vector<std::byte> buffer;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        if (stopped_) return;
        Slot* slot = n_opened_ == 0 ? nullptr : &slots_[(n_opened_ - 1) % slots_.size()];
        if (slot == nullptr || slot->n_claimed == slot->n_tasks) {
            if (position_ >= end_) return;
            try {
                if (open_slot()) {
                    slot_freed_.notify_all();  // there is work for all
                } else {
                    slot_freed_.wait(lock);
                }
            } catch (...) {  // no memory for the plan of a window
                broken_ = std::current_exception();
                end_ = 0;
                slot_filled_.notify_all();
            }
            continue;
        }
        const std::uint64_t task = slot->n_claimed++;
        if (slot->n_claimed == slot->n_tasks) slot_freed_.notify_all();  // the next window can begin
        lock.unlock();

        std::byte* to = pool_->data() + static_cast<std::size_t>(slot - slots_.data()) * slot_bytes_;
        std::exception_ptr failure;
        std::int64_t failed_row = 0;
        try {
            requests(*slot, task, wanted);
            read(wanted, to, buffer);
        } catch (const RowError& error) {
            failure = std::current_exception();
            failed_row = error.row;
        } catch (...) {
            failure = std::current_exception();
            failed_row = -1;
        }

        lock.lock();
        if (failure && (!slot->failure || std::pair(failed_row, task) < slot->failed)) {
            slot->failure = failure;
            slot->failed = {failed_row, task};
            end_ = 0;  // nothing after it will be wanted
        }
        if (++slot->n_done == slot->n_tasks) slot_filled_.notify_all();
    }
}

std::optional<Prefetcher::View> Prefetcher::take(std::size_t n, double seconds) {
    std::unique_lock<std::mutex> lock(mutex_);
    Slot& slot = slots_[(current_ - 1) % slots_.size()];
    // a window that was begun comes, even if none after it can
    const auto here = [&] { return stopped_ || (slot.sequence == current_ ? slot.ready() : broken_ != nullptr); };
    const bool came = slot_filled_.wait_for(lock, std::chrono::duration<double>(seconds), here);
    if (stopped_) throw std::runtime_error("the prefetcher was stopped");
    if (came && slot.sequence != current_) std::rethrow_exception(broken_);
    if (!came) {
        if (slot.sequence != current_ && slot.consumed && slot.n_views > 0)
            throw HeldTooLong(std::to_string(slot.n_views) + " batches of an earlier window are still held");
        return std::nullopt;
    }
    if (slot.failure) std::rethrow_exception(slot.failure);
    const std::size_t count = std::min<std::uint64_t>({n, slot.n_rows - taken_, left_});
    const auto index = static_cast<std::size_t>(&slot - slots_.data());
    const View view{index, pool_->data() + index * slot_bytes_ + taken_ * reader_.row_bytes(), count};
    ++slot.n_views;
    taken_ += count;
    left_ -= count;
    if (taken_ == slot.n_rows || left_ == 0) {
        slot.consumed = true;
        ++current_;
        taken_ = 0;
    }
    return view;
}

void Prefetcher::release(std::size_t slot) {
    bool freed = false;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        --slots_[slot].n_views;
        freed = slots_[slot].free();
    }
    if (freed) slot_freed_.notify_one();
}

}  // namespace fastdiff
