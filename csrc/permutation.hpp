// A keyed shuffle of [0, n) that needs no memory: any position of any epoch in O(1). "Order v1".
//
// The order is part of what a run means, so it is specified here and never changes under this name. All arithmetic
// is on unsigned 64-bit integers modulo 2^64; nothing depends on the machine, the compiler or the thread count.
//
//   mix(z):     z += 0x9E3779B97F4A7C15
//               z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
//               z = (z ^ (z >> 27)) * 0x94D049BB133111EB
//               return z ^ (z >> 31)                                  (splitmix64)
//   keys:       s = mix(mix(seed) ^ epoch);  for i = 0..5:  s = mix(s + i), key[i] = s
//   half width: h = max(1, ceil(bits / 2)), bits = the length of n - 1 in binary
//   one pass:   l = x >> h, r = x mod 2^h;  for i = 0..5:  (l, r) = (r, l ^ (mix(r ^ key[i]) mod 2^h))
//               result (l << h) | r: a bijection of [0, 4^h)
//   order(x):   repeat x = pass(x) until x < n                        (cycle walking: a bijection of [0, n))
//
// 4^h < 4n for n > 1, so the walk takes fewer than 4 passes on average. The inverse runs the rounds backwards.
// Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains"; Steele et al. 2014 for splitmix64.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace fastdiff {

class Permutation {
 public:
    // `n` from 1 to 2^62. Equal (n, seed, epoch) give the same order on every machine.
    Permutation(std::uint64_t n, std::uint64_t seed, std::uint64_t epoch);

    // Where index `x` in [0, n) of the epoch points to, in [0, n).
    std::uint64_t operator()(std::uint64_t x) const;

    // The index that points to `y`.
    std::uint64_t inverse(std::uint64_t y) const;

 private:
    static constexpr int kRounds = 6;

    std::uint64_t n_;
    int half_bits_;
    std::uint64_t half_mask_;
    std::array<std::uint64_t, kRounds> keys_;
};

// Writes order(start), order(start + 1), ... to `out`; start + count must be at most n.
void permute(const Permutation& order, std::uint64_t start, std::size_t count, std::int64_t* out);

}  // namespace fastdiff
