// W8A8: weights with a scale per output channel times activations with a scale per token.
#include <vector>

#include "panel.h"

namespace pagewire {
namespace {

constexpr int64_t kRows = 8;    // of x, and
constexpr int64_t kPanels = 2;  // that one tile multiplies: 16 sums, in registers
constexpr int32_t kOffset = 128;  // weights are stored plus this

struct Matrix {
    const uint8_t* weight;  // [num_panels, in_features / kGroup, kPanel, kGroup]
    const float* scale;     // [num_panels * kPanel]
    const float* bias;      // [num_panels * kPanel]
    int64_t in_features;
    int64_t out_features;
};

template <typename T>
struct Rows {
    const int8_t* x;       // [rows, in_features]
    const float* scale;    // [rows]
    const int32_t* sum;    // [rows], of x
    T* out;                // [rows, out_features]
};

template <int64_t R, int64_t P, typename T>
void multiply_tile(const Matrix& matrix, const Rows<T>& rows, int64_t row, int64_t panel) {
    const int64_t depth = matrix.in_features;
    const uint8_t* weight = matrix.weight + panel * kPanel * depth;
    const int8_t* x = rows.x + row * depth;
    PanelInts sums[R][P] = {};
    for (int64_t k = 0; k < depth; k += kGroup) {
        PanelBytes bytes[P];
        for (int64_t p = 0; p < P; ++p) bytes[p] = load_bytes(weight + (p * depth + k) * kPanel);
        for (int64_t r = 0; r < R; ++r)
            for (int64_t p = 0; p < P; ++p) sums[r][p] = dot(sums[r][p], bytes[p], x + r * depth + k);
    }
    for (int64_t r = 0; r < R; ++r)
        for (int64_t p = 0; p < P; ++p) {
            const int64_t channel = (panel + p) * kPanel;
            const PanelInts exact = sums[r][p] - kOffset * rows.sum[row + r];
            const PanelFloats scale = load_panel(matrix.scale + channel) * rows.scale[row + r];
            store_panel(rows.out + (row + r) * matrix.out_features + channel,
                        __builtin_convertvector(exact, PanelFloats) * scale +
                            load_panel(matrix.bias + channel),
                        std::min(kPanel, matrix.out_features - channel));
        }
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// out = x weightᵀ + bias. x: int8 [rows, in_features] with x_scale: [rows]; weight, scale and bias as
// in Matrix, filled up to whole panels; out: [rows, out_features].
PAGEWIRE_EXPORT void linear_int8(int64_t dtype, const void* x, const void* x_scale,
                                 const void* weight, const void* scale, const void* bias, void* out,
                                 int64_t rows, int64_t in_features, int64_t out_features) {
    const Matrix matrix{static_cast<const uint8_t*>(weight), static_cast<const float*>(scale),
                        static_cast<const float*>(bias), in_features, out_features};
    const int8_t* values = static_cast<const int8_t*>(x);
    std::vector<int32_t> row_sums(rows);
    for (int64_t row = 0; row < rows; ++row)
        row_sums[row] = sum_of(values + row * in_features, in_features);
    const int64_t num_panels = (out_features + kPanel - 1) / kPanel;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> operands{values, static_cast<const float*>(x_scale), row_sums.data(),
                               static_cast<T*>(out)};
#pragma omp parallel for if (rows * in_features * out_features > kSerialProducts)
        for (int64_t panel = 0; panel < num_panels; panel += kPanels)
            for_each_row_tile<kRows>(rows, 0, [&](int64_t row, auto count) {
                if (panel + kPanels <= num_panels)
                    multiply_tile<count(), kPanels>(matrix, operands, row, panel);
                else
                    multiply_tile<count(), 1>(matrix, operands, row, panel);
            });
    });
}
