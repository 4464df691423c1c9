#include "statistics.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace fastdiff {

namespace {

constexpr std::size_t kBlock = 32;  // rows
constexpr std::size_t kTile = 64;   // columns: 16 kB as float64 stay in the first cache, and no line is fetched twice
constexpr std::size_t kLanes = 8;   // partial sums of a row's norm

float widen(float value) { return value; }

float widen(std::uint16_t bits) {
    const std::uint32_t wide = static_cast<std::uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// Sums over one tile of one block.
struct Tile {
    alignas(64) double values[kBlock][kTile];
    alignas(64) double mean[kTile];
    alignas(64) double m2[kTile];
};

template <typename Value>
inline __attribute__((always_inline)) void load(Tile& tile, double (*squares)[kLanes], const Value* rows,
                                                std::size_t stride, std::size_t n_rows, std::size_t width) {
    for (std::size_t r = 0; r < n_rows; ++r) {
        double* to = tile.values[r];
        const Value* from = rows + r * stride;
        if (width == kTile) {
            for (std::size_t c = 0; c < kTile; ++c) to[c] = static_cast<double>(widen(from[c]));
        } else {
            for (std::size_t c = 0; c < width; ++c) to[c] = static_cast<double>(widen(from[c]));
            for (std::size_t c = width; c < kTile; ++c) to[c] = 0.0;
        }
        double sums[kLanes];
        for (std::size_t i = 0; i < kLanes; ++i) sums[i] = squares[r][i];
        for (std::size_t c = 0; c < kTile; c += kLanes)
            for (std::size_t i = 0; i < kLanes; ++i) sums[i] += to[c + i] * to[c + i];
        for (std::size_t i = 0; i < kLanes; ++i) squares[r][i] = sums[i];
    }
}

inline __attribute__((always_inline)) void reduce(Tile& tile, std::size_t n_rows) {
    const double n = static_cast<double>(n_rows);
    for (std::size_t first = 0; first < kTile; first += kLanes) {
        double sums[kLanes] = {}, squares[kLanes] = {};
        for (std::size_t r = 0; r < n_rows; ++r)
            for (std::size_t i = 0; i < kLanes; ++i) sums[i] += tile.values[r][first + i];
        for (std::size_t i = 0; i < kLanes; ++i) sums[i] /= n;
        for (std::size_t r = 0; r < n_rows; ++r)
            for (std::size_t i = 0; i < kLanes; ++i) {
                const double distance = tile.values[r][first + i] - sums[i];
                squares[i] += distance * distance;
            }
        for (std::size_t i = 0; i < kLanes; ++i) tile.mean[first + i] = sums[i], tile.m2[first + i] = squares[i];
    }
}

template <typename Value>
inline __attribute__((always_inline)) void add(RowStatistics& to, const Value* rows, std::size_t n_rows,
                                               std::size_t n_models, std::size_t d_model) {
    Tile tile;
    for (std::size_t start = 0; start < n_rows; start += kBlock) {
        const std::size_t n = std::min(kBlock, n_rows - start);
        const double before = static_cast<double>(to.n), total = before + static_cast<double>(n);
        const double share = static_cast<double>(n) / total, weight = before * static_cast<double>(n) / total;
        for (std::size_t m = 0; m < n_models; ++m) {
            double squares[kBlock][kLanes] = {};
            const Value* block = rows + (start * n_models + m) * d_model;
            for (std::size_t first = 0; first < d_model; first += kTile) {
                const std::size_t width = std::min(kTile, d_model - first);
                load(tile, squares, block + first, n_models * d_model, n, width);
                reduce(tile, n);
                double *mean = to.mean + m * d_model + first, *m2 = to.m2 + m * d_model + first;
                for (std::size_t c = 0; c < width; ++c) {
                    const double delta = tile.mean[c] - mean[c];
                    m2[c] += tile.m2[c] + delta * delta * weight;
                    mean[c] += delta * share;
                }
            }
            for (std::size_t r = 0; r < n; ++r) {
                double sum = 0.0;
                for (const double part : squares[r]) sum += part;
                to.norms[m] += std::sqrt(sum);
            }
        }
        to.n += n;
    }
}

template <typename Value>
inline __attribute__((always_inline)) void norms_of(const Value* vectors, std::size_t n, std::size_t width,
                                                    float* norms) {
    for (std::size_t i = 0; i < n; ++i) {
        const Value* vector = vectors + i * width;
        double sums[kLanes] = {};
        const std::size_t whole = width - width % kLanes;
        for (std::size_t c = 0; c < whole; c += kLanes)
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                const double value = static_cast<double>(widen(vector[c + lane]));
                sums[lane] += value * value;
            }
        for (std::size_t c = whole; c < width; ++c) {
            const double value = static_cast<double>(widen(vector[c]));
            sums[c - whole] += value * value;
        }
        double sum = 0.0;
        for (const double part : sums) sum += part;
        norms[i] = static_cast<float>(std::sqrt(sum));
    }
}

#if defined(__x86_64__)
// Twice as many lanes. Without fused multiply-add, so the bits are those of the portable path.
template <typename Value>
__attribute__((target("avx2"))) void add_avx2(RowStatistics& to, const Value* rows, std::size_t n_rows,
                                              std::size_t n_models, std::size_t d_model) {
    add(to, rows, n_rows, n_models, d_model);
}

template <typename Value>
__attribute__((target("avx2"))) void norms_avx2(const Value* vectors, std::size_t n, std::size_t width, float* norms) {
    norms_of(vectors, n, width, norms);
}
#endif

template <typename Value>
void dispatch(RowStatistics& to, const Value* rows, std::size_t n_rows, std::size_t n_models, std::size_t d_model) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return add_avx2(to, rows, n_rows, n_models, d_model);
#endif
    add(to, rows, n_rows, n_models, d_model);
}

template <typename Value>
void dispatch_norms(const Value* vectors, std::size_t n, std::size_t width, float* norms) {
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx2")) return norms_avx2(vectors, n, width, norms);
#endif
    norms_of(vectors, n, width, norms);
}

}  // namespace

void add_rows(RowStatistics& statistics, const float* rows, std::size_t n_rows, std::size_t n_models,
              std::size_t d_model) {
    dispatch(statistics, rows, n_rows, n_models, d_model);
}

void add_rows(RowStatistics& statistics, const std::uint16_t* rows, std::size_t n_rows, std::size_t n_models,
              std::size_t d_model) {
    dispatch(statistics, rows, n_rows, n_models, d_model);
}

void row_norms(const float* vectors, std::size_t n, std::size_t width, float* norms) {
    dispatch_norms(vectors, n, width, norms);
}

void row_norms(const std::uint16_t* vectors, std::size_t n, std::size_t width, float* norms) {
    dispatch_norms(vectors, n, width, norms);
}

}  // namespace fastdiff
