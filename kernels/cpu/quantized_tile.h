// The product of activations in 8 bits with weights in 8 bits or fewer, both with scales per group of
// 32 input features. A weight is scale * quant + minimum, its quant unsigned:
//
//   Σ_k w_k x_k = Σ_groups scale_w scale_x Σ_k quant_k value_k + minimum Σ_k x_k
//
// Within a group the products are summed as integers, so exactly.
#pragma once

#include "activation_group.h"
#include "panel.h"

namespace pagewire {

constexpr int64_t kSteps = kGroup / kStep;
constexpr int64_t kRows = 4;    // of a tile, at most: with two panels, all sums fit in registers
constexpr int64_t kAhead = 4;   // groups between what is read and what is fetched into the cache
constexpr int64_t kStrip = 4;   // panels that a thread takes at a time

// `Weights` is one group of a panel: has scale[kPanel], minimum[kPanel] and bytes(step), the quants
// of kStep features.
template <typename Weights>
struct Matrix {
    const Weights* weights;  // [num_panels, num_groups]
    const float* bias;       // [num_panels * kPanel]
    int64_t num_groups;
    int64_t out_features;
};

template <typename Weights>
inline void prefetch(const Weights* group) {
    for (size_t line = 0; line < sizeof(Weights); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(group) + line);
}

// Adds the products of one group of R rows, `stride` apart, and P panels to their totals.
template <int64_t R, int64_t P, typename Weights>
inline __attribute__((always_inline)) void add_group(PanelFloats (&totals)[R][P],
                                                     const Weights* const (&weights)[P],
                                                     const ActivationGroup* x, int64_t stride) {
    PanelInts sums[R][P] = {};
    const auto add = [&](auto term) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int64_t step = 0; step < kSteps; ++step) {
            PanelBytes bytes[P];
            for (int64_t p = 0; p < P; ++p) bytes[p] = weights[p]->bytes(step);
            for (int64_t r = 0; r < R; ++r)
                for (int64_t p = 0; p < P; ++p)
                    sums[r][p] = dot(sums[r][p], bytes[p], x[r * stride].*term + step * kStep);
        }
    };
    add(&ActivationGroup::values);
    float unit = 1.0f;
    int32_t refined = 0;
    for (int64_t r = 0; r < R; ++r) refined |= x[r * stride].refined;
    if (refined) {
        // Rows without remainders get the same sum in other units: they do not depend on the others.
        for (int64_t r = 0; r < R; ++r)
            for (int64_t p = 0; p < P; ++p) sums[r][p] *= static_cast<int32_t>(kRefinement);
        add(&ActivationGroup::remainders);
        unit = 1.0f / kRefinement;
    }
    for (int64_t p = 0; p < P; ++p) {
        const PanelFloats scale = load_panel(weights[p]->scale) * unit;
        const PanelFloats minimum = load_panel(weights[p]->minimum);
        for (int64_t r = 0; r < R; ++r) {
            totals[r][p] += minimum * x[r * stride].sum;
            totals[r][p] += __builtin_convertvector(sums[r][p], PanelFloats) * scale *
                            x[r * stride].scale;
        }
    }
}

// totals = the products of R rows with P panels; x: their groups.
template <int64_t R, int64_t P, typename Weights>
__attribute__((noinline)) void multiply_tile(PanelFloats (&totals)[R][P],
                                             const Matrix<Weights>& matrix,
                                             const ActivationGroup* x, int64_t panel) {
    const int64_t num_groups = matrix.num_groups;
    PanelFloats sums[R][P] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
        const Weights* weights[P];
        for (int64_t p = 0; p < P; ++p) {
            weights[p] = matrix.weights + (panel + p) * num_groups + group;
            prefetch(weights[p] + kAhead);
        }
        add_group(sums, weights, x + group, num_groups);
    }
    std::memcpy(totals, sums, sizeof sums);
}

template <int64_t R, int64_t P, typename Weights, typename T>
void store_tile(const PanelFloats (&totals)[R][P], const Matrix<Weights>& matrix, T* out,
                int64_t panel) {
    for (int64_t r = 0; r < R; ++r)
        for (int64_t p = 0; p < P; ++p) {
            const int64_t channel = (panel + p) * kPanel;
            store_panel(out + r * matrix.out_features + channel,
                        totals[r][p] + load_panel(matrix.bias + channel),
                        std::min(kPanel, matrix.out_features - channel));
        }
}

// out = x weightᵀ + bias.
template <typename Weights>
void multiply(int64_t dtype, const Matrix<Weights>& matrix, const void* x, void* out, int64_t rows) {
    const ActivationGroup* groups = static_cast<const ActivationGroup*>(x);
    const int64_t num_panels = (matrix.out_features + kPanel - 1) / kPanel;
    const int64_t products = rows * matrix.num_groups * kGroup * matrix.out_features;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out);
#pragma omp parallel for if (products > kSerialProducts)
        for (int64_t strip = 0; strip < num_panels; strip += kStrip)
            for_each_tile<kRows>(0, rows, [&](int64_t row, auto num_rows) {
                // One row alone has few sums: more panels hide how long each takes.
                constexpr int64_t kPanels = num_rows() == 1 ? kStrip : 2;
                const int64_t end = std::min(strip + kStrip, num_panels);
                for_each_tile<kPanels>(strip, end, [&](int64_t panel, auto num_tile_panels) {
                    PanelFloats totals[num_rows()][num_tile_panels()];
                    multiply_tile(totals, matrix, groups + row * matrix.num_groups, panel);
                    store_tile(totals, matrix, to + row * matrix.out_features, panel);
                });
            });
    });
}

}  // namespace pagewire
