// What sampling and log probabilities share: a row of values over the vocabulary, its largest
// without sorting it, and its exponentials.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>

#include "common.h"

namespace pagewire {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

typedef double Doubles __attribute__((vector_size(kLanes * 8)));

// A vector at `index` of a row; lanes behind its end are `fill`.
inline Floats load_or(const float* row, int64_t index, int64_t size, float fill) {
    if (index + kLanes <= size) return load(row + index);
    Floats values = broadcast(fill);
    std::memcpy(&values, row + index, (size - index) * sizeof(float));
    return values;
}

// ---- the largest --------------------------------------------------------------------------------

// A row is cut into chunks of so many vectors; a group is one lane of a chunk, so that the maximum
// of a group needs no sum across lanes.
constexpr int64_t kChunk = 64 * kLanes;

inline int64_t num_groups(int64_t size) { return (size + kChunk - 1) / kChunk * kLanes; }

// Writes the maximum of each group to `maxima` [num_groups(size)], -inf where lanes have no value.
// Returns the largest of all, NaN where any value is NaN.
inline float group_maxima(const float* row, int64_t size, float* maxima) {
    Floats highest = broadcast(-kInfinity);
    Ints is_nan = {};
    for (int64_t begin = 0; begin < size; begin += kChunk) {
        Floats group = broadcast(-kInfinity);
        const int64_t end = std::min(begin + kChunk, size);
        for (int64_t i = begin; i < end; i += kLanes) {
            const Floats values = load_or(row, i, size, -kInfinity);
            group = values > group ? values : group;
            is_nan |= values != values;
        }
        store(maxima + begin / kChunk * kLanes, group);
        highest = group > highest ? group : highest;
    }
    for (int64_t lane = 0; lane < kLanes; ++lane)
        if (is_nan[lane]) return std::numeric_limits<float>::quiet_NaN();
    return max(highest);
}

// The first index of `highest`, the largest of the row.
inline int64_t first_of(float highest, const float* row, int64_t size, const float* maxima) {
    const int64_t groups = num_groups(size);
    const int64_t group = std::find(maxima, maxima + groups, highest) - maxima;
    const float* chunk = row + group / kLanes * kChunk;
    return std::find(chunk, row + size, highest) - row;
}

// One bit a lane.
inline uint32_t lanes_at_least(Floats values, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)values, _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)values, _mm256_set1_ps(bound), _CMP_GE_OQ));
#else
    uint32_t bits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) bits |= (values[lane] >= bound) << lane;
    return bits;
#endif
}

// Stores the lanes that `bits` names behind one another, and returns how many. Up to kLanes numbers
// at `to` change.
inline int64_t compress(uint32_t bits, Floats values, float* to) {
#if defined(__AVX512F__)
    store(to, (Floats)_mm512_maskz_compress_ps(bits, (__m512)values));
    return __builtin_popcount(bits);
#else
    int64_t count = 0;
    for (; bits; bits &= bits - 1) to[count++] = values[__builtin_ctz(bits)];
    return count;
#endif
}

// Copies the values that reach `bound` to `values`, and their indices, rising, to `ids`. Returns
// how many.
inline int64_t copy_at_least(const float* row, int64_t size, float bound, float* values,
                             int32_t* ids) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        // NaN reaches no bound, not even -inf.
        uint32_t bits = lanes_at_least(load_or(row, i, size, __builtin_nanf("")), bound);
        for (; bits; bits &= bits - 1, ++count) {
            const int64_t index = i + __builtin_ctz(bits);
            values[count] = row[index];
            ids[count] = static_cast<int32_t>(index);
        }
    }
    return count;
}

// Copies the values from `low` up and below `high` to `values`, which may be `row`, with room for
// kLanes more. Returns how many.
inline int64_t copy_between(const float* row, int64_t size, float low, float high, float* values) {
    int64_t count = 0;
    for (int64_t i = 0; i < size; i += kLanes) {
        const Floats loaded = load_or(row, i, size, __builtin_nanf(""));
        const uint32_t bits = lanes_at_least(loaded, low) & ~lanes_at_least(loaded, high);
        count += compress(bits, loaded, values + count);
    }
    return count;
}

// As copy_at_least, for a bound that at least `rank` <= num_groups(size) values reach, and seldom
// many more: the rank-th largest of the maxima, which change their order.
inline int64_t copy_largest(const float* row, int64_t size, float* maxima, int64_t rank,
                            float* values, int32_t* ids) {
    std::nth_element(maxima, maxima + rank - 1, maxima + num_groups(size), std::greater<float>());
    return copy_at_least(row, size, maxima[rank - 1], values, ids);
}

// ---- exponentials -------------------------------------------------------------------------------

// weights = exp((values - highest) / temperature); `weights` may be `values`.
inline void weigh(const float* values, int64_t size, float highest, float temperature,
                  float* weights) {
    const float factor = 1.0f / temperature;
    for_each_vector(size, [&](int64_t i, auto load, auto store) {
        store(weights + i, exp((load(values + i) - highest) * factor));
    });
}

// The sum of `term` of all values of a row, taken a vector at a time; lanes behind the end of the row
// are `fill`. Sums are in float32 over short runs, and in float64 over these.
template <typename Term>
inline double sum_in_runs(const float* row, int64_t size, float fill, Term term) {
    constexpr int64_t kRun = 32 * kLanes;
    Doubles sums = {};
    Floats even = {}, odd = {};  // two, so that additions need not wait for one another
    const auto flush = [&] {
        sums += __builtin_convertvector(even + odd, Doubles);
        even = odd = Floats{};
    };
    int64_t i = 0;
    for (; i + kRun <= size; flush())
        for (const int64_t end = i + kRun; i < end; i += 2 * kLanes) {
            even += term(load(row + i));
            odd += term(load(row + i + kLanes));
        }
    for (; i < size; i += kLanes) even += term(load_or(row, i, size, fill));
    flush();
    double sum = 0.0;
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += sums[lane];
    return sum;
}

// The sum of what `weigh` would store, for those who need no single weight.
inline double sum_of_weights(const float* values, int64_t size, float highest, float temperature) {
    const float factor = 1.0f / temperature;
    return sum_in_runs(values, size, -kInfinity,
                       [&](Floats logits) { return exp((logits - highest) * factor); });
}

// How many weights reach a bound, and their sum.
struct Mass {
    int64_t count;
    double sum;
};

inline Mass operator+(const Mass& a, const Mass& b) { return {a.count + b.count, a.sum + b.sum}; }

// Weights are not negative.
inline Mass mass_at_least(const float* weights, int64_t size, float bound) {
    Ints counts = {};
    Mass mass = {};
    mass.sum = sum_in_runs(weights, size, -1.0f, [&](Floats values) {
        const Ints reaches = values >= bound;
        counts -= reaches;
        return reaches ? values : Floats{};
    });
    for (int64_t lane = 0; lane < kLanes; ++lane) mass.count += counts[lane];
    return mass;
}

// Memory of one thread for one row.
struct Scratch {
    explicit Scratch(int64_t size)
        : maxima(new float[num_groups(size)]), weights(new float[size]), listed(new float[size]),
          ids(new int32_t[size]), between(new float[size + kLanes]) {}

    std::unique_ptr<float[]> maxima;
    std::unique_ptr<float[]> weights;  // of all tokens
    std::unique_ptr<float[]> listed;   // the largest values, or their weights
    std::unique_ptr<int32_t[]> ids;    // of those
    std::unique_ptr<float[]> between;  // weights that a search is left with
};

}  // namespace pagewire
