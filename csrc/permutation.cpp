#include "permutation.hpp"

namespace fastdiff {

namespace {

std::uint64_t mix(std::uint64_t z) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

int binary_length(std::uint64_t x) {
    int bits = 0;
    for (; x != 0; x >>= 1) ++bits;
    return bits;
}

}  // namespace

Permutation::Permutation(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch) : n_(n) {
    const int half = (binary_length(n - 1) + 1) / 2;
    half_bits_ = half < 1 ? 1 : half;
    half_mask_ = (std::uint64_t{1} << half_bits_) - 1;
    std::uint64_t state = mix(mix(seed) ^ epoch);
    for (int i = 0; i < kRounds; ++i) {
        state = mix(state + static_cast<std::uint64_t>(i));
        keys_[static_cast<std::size_t>(i)] = state;
    }
}

std::uint64_t Permutation::operator()(std::uint64_t x) const {
    do {
        std::uint64_t left = x >> half_bits_;
        std::uint64_t right = x & half_mask_;
        for (const std::uint64_t key : keys_) {
            const std::uint64_t next = left ^ (mix(right ^ key) & half_mask_);
            left = right;
            right = next;
        }
        x = (left << half_bits_) | right;
    } while (x >= n_);
    return x;
}

std::uint64_t Permutation::inverse(std::uint64_t y) const {
    do {
        std::uint64_t left = y >> half_bits_;
        std::uint64_t right = y & half_mask_;
        for (auto key = keys_.rbegin(); key != keys_.rend(); ++key) {
            const std::uint64_t previous = right ^ (mix(left ^ *key) & half_mask_);
            right = left;
            left = previous;
        }
        y = (left << half_bits_) | right;
    } while (y >= n_);
    return y;
}

void permute(const Permutation& order, std::uint64_t start, std::size_t count, std::int64_t* out) {
    for (std::size_t i = 0; i < count; ++i) out[i] = static_cast<std::int64_t>(order(start + i));
}

}  // namespace fastdiff
