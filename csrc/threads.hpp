// Threads that are joined whatever happens to the one that started them.
#pragma once

#include <thread>
#include <utility>
#include <vector>

namespace fastdiff {

class Threads {
 public:
    Threads() = default;
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;
    ~Threads() { join(); }

    // `work` must not throw. Throws std::system_error if there can be no more threads.
    template <class Work>
    void start(Work work) {
        threads_.emplace_back(std::move(work));
    }

    void join() {
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

 private:
    std::vector<std::thread> threads_;
};

}  // namespace fastdiff
