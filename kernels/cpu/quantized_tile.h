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
constexpr int64_t kRows = 8;    // of a tile, at most: with two panels, as many sums as registers
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

template <typename T>
struct Rows {
    const ActivationGroup* x;  // [rows, num_groups]
    T* out;                    // [rows, out_features]
};

// One group of R rows, num_groups apart.
template <int64_t R>
struct RowGroups {
    const ActivationGroup* first;
    int64_t stride;

    const ActivationGroup& operator[](int64_t r) const { return first[r * stride]; }

    bool refined() const {
        uint64_t any = 0;
        for (int64_t r = 0; r < R; ++r)
            for (int64_t i = 0; i < kGroup; i += sizeof any) {
                uint64_t remainders;
                std::memcpy(&remainders, (*this)[r].remainders + i, sizeof remainders);
                any |= remainders;
            }
        return any != 0;
    }
};

template <int64_t R, int64_t P, typename Weights, typename T>
void multiply_tile(const Matrix<Weights>& matrix, const Rows<T>& rows, int64_t row, int64_t panel) {
    const int64_t num_groups = matrix.num_groups;
    PanelFloats totals[R][P] = {};
    for (int64_t group = 0; group < num_groups; ++group) {
        const RowGroups<R> x{rows.x + row * num_groups + group, num_groups};
        const Weights* weights[P];
        for (int64_t p = 0; p < P; ++p)
            weights[p] = matrix.weights + (panel + p) * num_groups + group;
        PanelInts sums[R][P] = {};
        const auto accumulate = [&](auto term) __attribute__((always_inline)) {
            for (int64_t step = 0; step < kSteps; ++step) {
                PanelBytes bytes[P];
                for (int64_t p = 0; p < P; ++p) bytes[p] = weights[p]->bytes(step);
                for (int64_t r = 0; r < R; ++r)
                    for (int64_t p = 0; p < P; ++p)
                        sums[r][p] = dot(sums[r][p], bytes[p], x[r].*term + step * kStep);
            }
        };
        accumulate(&ActivationGroup::values);
        float unit = 1.0f;
        // The other rows of the tile have remainders of 0, so theirs is the same sum in other units.
        if (x.refined()) {
            for (int64_t r = 0; r < R; ++r)
                for (int64_t p = 0; p < P; ++p) sums[r][p] *= static_cast<int32_t>(kRefinement);
            accumulate(&ActivationGroup::remainders);
            unit = 1.0f / kRefinement;
        }
        for (int64_t p = 0; p < P; ++p) {
            const PanelFloats scale = load_panel(weights[p]->scale) * unit;
            const PanelFloats minimum = load_panel(weights[p]->minimum);
            for (int64_t r = 0; r < R; ++r)
                totals[r][p] += __builtin_convertvector(sums[r][p], PanelFloats) * scale *
                                    x[r].scale +
                                minimum * x[r].sum;
        }
    }
    for (int64_t r = 0; r < R; ++r)
        for (int64_t p = 0; p < P; ++p) {
            const int64_t channel = (panel + p) * kPanel;
            store_panel(rows.out + (row + r) * matrix.out_features + channel,
                        totals[r][p] + load_panel(matrix.bias + channel),
                        std::min(kPanel, matrix.out_features - channel));
        }
}

// out = x weightᵀ + bias.
template <typename Weights>
void multiply(int64_t dtype, const Matrix<Weights>& matrix, const void* x, void* out, int64_t rows) {
    const int64_t num_panels = (matrix.out_features + kPanel - 1) / kPanel;
    const int64_t products = rows * matrix.num_groups * kGroup * matrix.out_features;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> operands{static_cast<const ActivationGroup*>(x), static_cast<T*>(out)};
#pragma omp parallel for if (products > kSerialProducts)
        for (int64_t strip = 0; strip < num_panels; strip += kStrip)
            for_each_tile<kRows>(0, rows, [&](int64_t row, auto num_rows) {
                // One row alone has few sums: more panels hide how long each takes.
                constexpr int64_t kPanels = num_rows() == 1 ? kStrip : 2;
                const int64_t end = std::min(strip + kStrip, num_panels);
                for_each_tile<kPanels>(strip, end, [&](int64_t panel, auto num_tile_panels) {
                    multiply_tile<num_rows(), num_tile_panels()>(matrix, operands, row, panel);
                });
            });
    });
}

}  // namespace pagewire
