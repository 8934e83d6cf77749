// The product of activations in 8 bits with weights in 8 bits or fewer, both with scales per group of
// 32 input features. A weight is scale * quant + minimum, its quant unsigned:
//
//   Σ_k w_k x_k = Σ_groups scale_w scale_x Σ_k quant_k value_k + minimum Σ_k x_k
//
// Within a group the products are summed as integers, so exactly.
#pragma once

#include "activation_group.h"
#include "panel.h"
#include "parts.h"

namespace pagewire {

constexpr int64_t kSteps = kGroup / kStep;
constexpr int64_t kAhead = 4;   // groups between what is read and what is fetched into the cache
constexpr int64_t kWidest = 4;  // panels of a tile of one row: few sums would wait for one another

// Rows of a tile, at most: with two panels all sums, integer and float, fit in registers.
#if defined(__AVX512F__)
constexpr int64_t kRows = 6;
#else
constexpr int64_t kRows = 4;
#endif

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

// sums += the products of one term of R rows, `stride` apart, with one group of P panels.
template <int64_t R, int64_t P, typename Weights>
inline __attribute__((always_inline)) void add_term(PanelInts (&sums)[R][P],
                                                    const Weights* const (&weights)[P],
                                                    const int8_t* x, int64_t stride) {
    UNROLL for (int64_t step = 0; step < kSteps; ++step) {
        PanelBytes bytes[P];
        UNROLL for (int64_t p = 0; p < P; ++p) bytes[p] = weights[p]->bytes(step);
        UNROLL for (int64_t r = 0; r < R; ++r)
            UNROLL for (int64_t p = 0; p < P; ++p)
                sums[r][p] = dot(sums[r][p], bytes[p], x + r * stride + step * kStep);
    }
}

// sums = sums * kRefinement + the products of the remainders of R rows, where these are refined.
template <int64_t R, int64_t P, typename Weights>
inline __attribute__((always_inline)) void refine_rows(PanelInts (*sums)[P],
                                                       const Weights* const (&weights)[P],
                                                       const ActivationGroup* x, int64_t stride) {
    PanelInts refined[R][P];
    UNROLL for (int64_t r = 0; r < R; ++r) {
        const int32_t factor = x[r * stride].refined ? static_cast<int32_t>(kRefinement) : 1;
        UNROLL for (int64_t p = 0; p < P; ++p) refined[r][p] = sums[r][p] * factor;
    }
    add_term(refined, weights, x->remainders, stride * sizeof(ActivationGroup));
    UNROLL for (int64_t r = 0; r < R; ++r)
        UNROLL for (int64_t p = 0; p < P; ++p) sums[r][p] = refined[r][p];
}

// The same for a tile in which `num_refined` rows are. Rare, and kept out of the tile's own loop.
template <int64_t R, int64_t P, typename Weights>
__attribute__((noinline)) void refine(PanelInts (&sums)[R][P], const Weights* const (&weights)[P],
                                      const ActivationGroup* x, int64_t stride,
                                      int32_t num_refined) {
    // Weights that are in registers serve all rows: some may be multiplied in vain.
    if (2 * num_refined > R) return refine_rows<R>(sums, weights, x, stride);
    for (int64_t r = 0; r < R; ++r)
        if (x[r * stride].refined) refine_rows<1>(sums + r, weights, x + r * stride, stride);
}

// Adds the products of one group of R rows, `stride` apart, and P panels to their totals.
template <int64_t R, int64_t P, typename Weights>
inline __attribute__((always_inline)) void add_group(PanelFloats (&totals)[R][P],
                                                     const Weights* const (&weights)[P],
                                                     const ActivationGroup* x, int64_t stride) {
    PanelInts sums[R][P];
    UNROLL for (int64_t r = 0; r < R; ++r)
        UNROLL for (int64_t p = 0; p < P; ++p) sums[r][p] = PanelInts{};
    add_term(sums, weights, x->values, stride * sizeof(ActivationGroup));
    int32_t num_refined = 0;
    UNROLL for (int64_t r = 0; r < R; ++r) num_refined += x[r * stride].refined;
    if (__builtin_expect(num_refined, 0)) {
        PanelInts tile[R][P];
        UNROLL for (int64_t r = 0; r < R; ++r)
            UNROLL for (int64_t p = 0; p < P; ++p) tile[r][p] = sums[r][p];
        refine(tile, weights, x, stride, num_refined);
        UNROLL for (int64_t r = 0; r < R; ++r)
            UNROLL for (int64_t p = 0; p < P; ++p) sums[r][p] = tile[r][p];
    }
    UNROLL for (int64_t p = 0; p < P; ++p) {
        const PanelFloats scale = load_panel(weights[p]->scale);
        const PanelFloats minimum = load_panel(weights[p]->minimum);
        UNROLL for (int64_t r = 0; r < R; ++r) {
            totals[r][p] += minimum * x[r * stride].sum;
            totals[r][p] +=
                __builtin_convertvector(sums[r][p], PanelFloats) * (scale * x[r * stride].unit);
        }
    }
}

// totals = the products of R rows with P panels; x: their groups. `fetch`: whether the weights are
// read for the first time.
template <int64_t R, int64_t P, typename Weights>
__attribute__((noinline)) void multiply_tile(PanelFloats (&totals)[R][P],
                                             const Matrix<Weights>& matrix,
                                             const ActivationGroup* x, int64_t panel, bool fetch) {
    const int64_t num_groups = matrix.num_groups;
    PanelFloats sums[R][P];
    UNROLL for (int64_t r = 0; r < R; ++r)
        UNROLL for (int64_t p = 0; p < P; ++p) sums[r][p] = PanelFloats{};
    for (int64_t group = 0; group < num_groups; ++group) {
        const Weights* weights[P];
        UNROLL for (int64_t p = 0; p < P; ++p)
            weights[p] = matrix.weights + (panel + p) * num_groups + group;
        if (fetch)
            UNROLL for (int64_t p = 0; p < P; ++p) prefetch(weights[p] + kAhead);
        add_group(sums, weights, x + group, num_groups);
    }
    UNROLL for (int64_t r = 0; r < R; ++r)
        UNROLL for (int64_t p = 0; p < P; ++p) totals[r][p] = sums[r][p];
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
    const int64_t num_panels = ceil_div(matrix.out_features, kPanel);
    const int64_t products = rows * matrix.num_groups * kGroup * matrix.out_features;
    const Parts strips = parts_for_threads(ceil_div(num_panels, 2), products);  // of pairs of panels
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        T* to = static_cast<T*>(out);
        // Whoever is free takes the next strip: a thread may have to share its core for a while.
#pragma omp parallel for schedule(dynamic) if (products > kSerialProducts)
        for (int64_t strip = 0; strip < strips.count; ++strip) {
            const int64_t start = 2 * strips.start(strip);
            const int64_t end = std::min(2 * strips.start(strip + 1), num_panels);
            const auto tile = [&](int64_t row, auto num_rows, int64_t panel, auto num_tile_panels) {
                PanelFloats totals[num_rows()][num_tile_panels()];
                multiply_tile(totals, matrix, groups + row * matrix.num_groups, panel, row == 0);
                store_tile(totals, matrix, to + row * matrix.out_features, panel);
            };
            if (rows == 1)
                for_each_tile<kWidest>(start, end, [&](int64_t panel, auto num_tile_panels) {
                    tile(0, std::integral_constant<int64_t, 1>{}, panel, num_tile_panels);
                });
            else
                for_each_tile<2>(start, end, [&](int64_t panel, auto num_tile_panels) {
                    for_each_tile<kRows>(0, rows, [&](int64_t row, auto num_rows) {
                        tile(row, num_rows, panel, num_tile_panels);
                    });
                });
        }
    });
}

}  // namespace pagewire
