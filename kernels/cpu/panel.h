// What the quantised matrix products share. A panel is 16 output channels side by side; its weights
// are unsigned, the activations signed, four products at a time go into the sum of a channel.
#pragma once

#include <algorithm>

#include "common.h"
#include "unroll.h"

namespace pagewire {

constexpr int64_t kPanel = 16;  // output channels
constexpr int64_t kStep = 4;    // input features of one step

// Products that one thread computes sooner than a second one is woken.
constexpr int64_t kSerialProducts = 1 << 18;

typedef int32_t PanelInts __attribute__((vector_size(kPanel * 4)));
typedef float PanelFloats __attribute__((vector_size(kPanel * 4)));
typedef uint8_t PanelBytes __attribute__((vector_size(kPanel * kStep)));

inline PanelBytes load_bytes(const uint8_t* from) {
    PanelBytes bytes;
    std::memcpy(&bytes, from, sizeof bytes);
    return bytes;
}

template <typename T>
inline PanelFloats load_panel(const T* from) {
    PanelFloats values;
    for (int64_t i = 0; i < kPanel; i += kLanes) {
        const Floats part = load(from + i);
        std::memcpy(reinterpret_cast<float*>(&values) + i, &part, sizeof part);
    }
    return values;
}

// The first `count` channels of a panel.
template <typename T>
inline void store_panel(T* to, PanelFloats values, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
        Floats part;
        std::memcpy(&part, reinterpret_cast<const float*>(&values) + i, sizeof part);
        if (count - i >= kLanes)
            store(to + i, part);
        else
            store_first(to + i, part, count - i);
    }
}

// sums[n] += Σ_j weights[n, j] x[j]; weights: [kPanel, kStep]; x: [kStep].
inline PanelInts dot(PanelInts sums, PanelBytes weights, const int8_t* x) {
#if defined(__AVX512VNNI__)
    int32_t group;
    std::memcpy(&group, x, sizeof group);
    return (PanelInts)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)weights, _mm512_set1_epi32(group));
#else
    for (int64_t n = 0; n < kPanel; ++n)
        for (int64_t j = 0; j < kStep; ++j) sums[n] += weights[n * kStep + j] * x[j];
    return sums;
#endif
}

}  // namespace pagewire
