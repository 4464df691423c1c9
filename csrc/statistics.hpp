// Float64 mean, spread and norm of rows of bfloat16 or float32, in one pass over memory.
//
// Rows are taken 32 at a time, and blocks are merged by Chan et al. (1983): with n = n_a + n_b and
// d = mean_b - mean_a, mean = mean_a + d n_b / n and M2 = M2_a + M2_b + d^2 n_a n_b / n, which does not cancel when
// the mean is large against the spread. The order of every sum is fixed, so equal rows in equal blocks give equal bits.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastdiff {

// Running sums over rows of `n_models` models of width `d_model`; the arrays belong to the caller.
struct RowStatistics {
    std::uint64_t n;  // rows so far
    double* mean;     // [n_models][d_model]
    double* m2;       // [n_models][d_model], sum of squared distances from the mean
    double* norms;    // [n_models], sum over rows of the L2 norm
};

// Count `n_rows` rows in, which lie back to back.
void add_rows(RowStatistics& statistics, const float* rows, std::size_t n_rows, std::size_t n_models,
              std::size_t d_model);
// The same, of bfloat16, whose bits are the upper half of a float's.
void add_rows(RowStatistics& statistics, const std::uint16_t* rows, std::size_t n_rows, std::size_t n_models,
              std::size_t d_model);

// The L2 norm of each of `n` vectors of `width` values, which lie back to back: summed in float64, rounded once.
void row_norms(const float* vectors, std::size_t n, std::size_t width, float* norms);
void row_norms(const std::uint16_t* vectors, std::size_t n, std::size_t width, float* norms);

}  // namespace fastdiff
