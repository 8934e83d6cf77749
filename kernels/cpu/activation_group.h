// Activations in 8 bits, as quantised matrices read them: a scale for each group of input features,
// and a second term where one byte would be too coarse.
#pragma once

#include <algorithm>

#include "common.h"

namespace pagewire {

constexpr int64_t kGroup = 32;  // input features

// x ≈ scale * (values + remainders / kRefinement). QuantizedActivation in ops.py has the same bytes.
struct ActivationGroup {
    int8_t values[kGroup];
    int8_t remainders[kGroup];
    float scale;
    float sum;  // of the 32 features, as they are represented here
    int32_t refined;  // 0: the remainders are all 0
};

constexpr float kRefinement = 128.0f;
// A group gets its second term when its scale is more than so many times the mean of its token's.
constexpr double kRefineAbove = 2.0;

inline float largest_magnitude(const float* x) {
    // Compared as integers, magnitudes keep their order and a NaN is above infinity, so that it
    // reaches the scale and no group with one passes for a sound one.
    Ints largest = {};
    for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Ints magnitude = (Ints)load(x + i) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    }
    const int32_t bits = largest_lane(largest);
    float magnitude;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
    return magnitude;
}

// x: [kGroup]; `to` has its scale already.
inline void quantize_group(const float* x, bool refine, ActivationGroup* to) {
    const Floats divisor = broadcast(to->scale == 0.0f ? 1.0f : to->scale);
    Floats total = {};  // integers below 2^24, so exact
    for (int64_t i = 0; i < kGroup; i += kLanes) {
        const Floats exact = load(x + i) / divisor;
        const Floats values = round_to_even(exact);
        const Floats remainders =
            refine ? round_to_even((exact - values) * kRefinement) : Floats{};
        store(to->values + i, values);
        store(to->remainders + i, remainders);
        total += values * kRefinement + remainders;
    }
    to->refined = refine;
    to->sum = sum_of_integers(total) * (to->scale / kRefinement);
}

// x: [dim]; to: [dim / kGroup, rounded up]. Features behind the last one count as 0.
template <typename T>
void quantize_row(const T* x, ActivationGroup* to, int64_t dim) {
    const int64_t num_groups = (dim + kGroup - 1) / kGroup;
    const auto for_each_group = [&](auto step) {
        for (int64_t group = 0; group < num_groups; ++group) {
            float features[kGroup] = {};
            const auto widen = [&](int64_t i, auto load, auto) {
                store(features + i, load(x + group * kGroup + i));
            };
            // A count that the compiler knows makes this several times as fast.
            if (dim - group * kGroup >= kGroup)
                for_each_vector(kGroup, widen);
            else
                for_each_vector(dim - group * kGroup, widen);
            step(features, to + group);
        }
    };
    double total = 0.0;
    for_each_group([&](const float* features, ActivationGroup* group) {
        group->scale = largest_magnitude(features) / 127.0f;
        total += group->scale;
    });
    const double limit = total / num_groups * kRefineAbove;
    for_each_group([&](const float* features, ActivationGroup* group) {
        quantize_group(features, group->scale > limit, group);
    });
}

}  // namespace pagewire
