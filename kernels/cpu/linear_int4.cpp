// W4A8: weights in GGUF's blocks of 32 input features, each with a scale and a minimum, as Q4_1 has
// them (Q4_0 is the case minimum = -8 scale), times activations with a scale per token.
//
// Σ_k (d q_k + m) x_k = d Σ_k q_k x_k + m Σ_k x_k: the numbers of a block are multiplied as integers.
#include <vector>

#include "panel.h"

namespace pagewire {
namespace {

constexpr int64_t kRows = 8;
constexpr int64_t kBlock = 32;                     // input features
constexpr int64_t kSteps = kBlock / 2 / kGroup;    // loads of two groups each

// One block of the 16 channels of a panel.
struct Block {
    uint8_t quants[kSteps][kPanel * kGroup];  // feature 4 step + j: low half, 16 + 4 step + j: high
    Float16 scale[kPanel];
    Float16 minimum[kPanel];
};

struct Matrix {
    const Block* blocks;  // [num_panels, in_features / kBlock]
    const float* bias;    // [num_panels * kPanel]
    int64_t in_features;
    int64_t out_features;
};

template <typename T>
struct Rows {
    const int8_t* x;         // [rows, in_features]
    const float* scale;      // [rows]
    const float* block_sum;  // [rows, in_features / kBlock], of x
    T* out;                  // [rows, out_features]
};

template <int64_t R, typename T>
void multiply_tile(const Matrix& matrix, const Rows<T>& rows, int64_t row, int64_t panel) {
    const int64_t depth = matrix.in_features, num_blocks = depth / kBlock;
    const Block* block = matrix.blocks + panel * num_blocks;
    PanelFloats totals[R] = {};
    for (int64_t b = 0; b < num_blocks; ++b, ++block) {
        PanelInts sums[R] = {};
        for (int64_t step = 0; step < kSteps; ++step) {
            const PanelBytes both = load_bytes(block->quants[step]);
            const PanelBytes low = both & 15, high = both >> 4;
            const int8_t* x = rows.x + row * depth + b * kBlock + step * kGroup;
            for (int64_t r = 0; r < R; ++r) {
                sums[r] = dot(sums[r], low, x + r * depth);
                sums[r] = dot(sums[r], high, x + r * depth + kBlock / 2);
            }
        }
        const PanelFloats scale = load_panel(block->scale), minimum = load_panel(block->minimum);
        for (int64_t r = 0; r < R; ++r)
            totals[r] += __builtin_convertvector(sums[r], PanelFloats) * scale +
                         minimum * rows.block_sum[(row + r) * num_blocks + b];
    }
    const int64_t channel = panel * kPanel;
    for (int64_t r = 0; r < R; ++r)
        store_panel(rows.out + (row + r) * matrix.out_features + channel,
                    totals[r] * rows.scale[row + r] + load_panel(matrix.bias + channel),
                    std::min(kPanel, matrix.out_features - channel));
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// out = x weightᵀ + bias. x: int8 [rows, in_features] with x_scale: [rows]; blocks and bias as in
// Matrix, filled up to whole panels; out: [rows, out_features]; in_features: a multiple of kBlock.
PAGEWIRE_EXPORT void linear_int4(int64_t dtype, const void* x, const void* x_scale,
                                 const void* blocks, const void* bias, void* out, int64_t rows,
                                 int64_t in_features, int64_t out_features) {
    const Matrix matrix{static_cast<const Block*>(blocks), static_cast<const float*>(bias),
                        in_features, out_features};
    const int8_t* values = static_cast<const int8_t*>(x);
    std::vector<float> block_sums(rows * in_features / kBlock);
    for (size_t index = 0; index < block_sums.size(); ++index)
        block_sums[index] = static_cast<float>(sum_of(values + index * kBlock, kBlock));
    const int64_t num_panels = (out_features + kPanel - 1) / kPanel;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Rows<T> operands{values, static_cast<const float*>(x_scale), block_sums.data(),
                               static_cast<T*>(out)};
#pragma omp parallel for if (rows * in_features * out_features > kSerialProducts)
        for (int64_t panel = 0; panel < num_panels; ++panel)
            for_each_row_tile<kRows>(rows, 0, [&](int64_t row, auto count) {
                multiply_tile<count()>(matrix, operands, row, panel);
            });
    });
}
