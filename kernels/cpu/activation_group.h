// Activations in 8 bits, as quantised matrices read them: a scale for each group of input features,
// and a second term where one byte would be too coarse.
#pragma once

#include <algorithm>
#include <limits>

#include "common.h"
#include "unroll.h"

namespace pagewire {

constexpr int64_t kGroup = 32;  // input features

// x ≈ unit * (values * kRefinement + remainders) where refined, else unit * values.
// GroupedActivation in ops.py has the same bytes.
struct ActivationGroup {
    int8_t values[kGroup];
    int8_t remainders[kGroup];
    float unit;
    float sum;  // of the 32 features, as they are represented here
    int32_t refined;  // 0: the remainders are all 0
};

constexpr float kRefinement = 128.0f;
// A group gets its second term when its scale is more than so many times the mean of its token's.
constexpr double kRefineAbove = 2.0;

// The largest magnitude of x: [kGroup].
template <typename T>
inline float largest_magnitude(const T* x) {
    // Compared as integers, magnitudes keep their order and a NaN is above infinity, so that it
    // reaches the scale and no group with one passes for a sound one.
    Ints largest = {};
    UNROLL for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Ints magnitude = (Ints)load(x + i) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = largest_lane(largest);
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}

// x: [kGroup]; Refined: with its second term.
template <bool Refined, typename T>
inline void quantize_group(const T* x, float scale, ActivationGroup* to) {
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    Ints total = {};
    UNROLL for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats exact = rounded(load(x + i) * inverse);
        const Ints values = nearest_integers(exact);
        store(to->values + i, values);
        if constexpr (Refined) {
            const Floats rest = exact - __builtin_convertvector(values, Floats);
            const Ints remainders = nearest_integers(rest * kRefinement);
            store(to->remainders + i, remainders);
            total += values * static_cast<int32_t>(kRefinement) + remainders;
        } else {
            total += values;
        }
    }
    if constexpr (!Refined) std::memset(to->remainders, 0, sizeof to->remainders);
    to->unit = Refined ? scale / kRefinement : scale;
    to->sum = sum_of_lanes(total) * to->unit;
    to->refined = Refined;
}

// x: [dim]; to: [dim / kGroup, rounded up]. Features behind the last one count as 0.
template <typename T>
void quantize_row(const T* x, ActivationGroup* to, int64_t dim) {
    const int64_t num_whole = dim / kGroup, rest = dim % kGroup;
    const int64_t num_groups = num_whole + (rest > 0);
    T padded[kGroup] = {};
    std::memcpy(padded, x + num_whole * kGroup, rest * sizeof(T));
    const auto group = [&](int64_t index) {
        return index < num_whole ? x + index * kGroup : padded;
    };
    double total = 0.0;
    for (int64_t index = 0; index < num_groups; ++index) {
        const float scale = largest_magnitude(group(index)) / 127.0f;
        // Its inverse would be infinite; a NaN passes.
        to[index].unit = scale < std::numeric_limits<float>::min() ? 0.0f : scale;
        total += to[index].unit;
    }
    const double limit = total / num_groups * kRefineAbove;
    for (int64_t index = 0; index < num_groups; ++index) {
        const float scale = to[index].unit;
        if (__builtin_expect(scale > limit, 0))
            quantize_group<true>(group(index), scale, to + index);
        else
            quantize_group<false>(group(index), scale, to + index);
    }
}

}  // namespace pagewire
