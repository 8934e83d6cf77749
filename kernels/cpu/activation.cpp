// What stands between two matrices: SiLU(gate) * up, and 8-bit quantisation per token.
#include "rows.h"

using namespace pagewire;

// gate_up: [rows, 2 * dim], gate first; output: [rows, dim].
PAGEWIRE_EXPORT void silu_mul(int64_t dtype, const void* gate_up, void* out, int8_t* values,
                              float* scales, int64_t rows, int64_t dim) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_each_row<T>(rows, dim, {out, values, scales}, [&](int64_t row, T* to) {
            const T* gate = static_cast<const T*>(gate_up) + row * 2 * dim;
            const T* up = gate + dim;
            for_each_vector(dim, [&](int64_t i, auto load, auto store) {
                const Floats x = load(gate + i);
                store(to + i, x / (1.0f + exp(-x)) * load(up + i));
            });
        });
    });
}

// x: [rows, dim]; values: [rows, dim]; scales: [rows].
PAGEWIRE_EXPORT void quantize(int64_t dtype, const void* x, int8_t* values, float* scales,
                              int64_t rows, int64_t dim) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for if (rows > 1 && rows * dim > kSerialElements)
        for (int64_t row = 0; row < rows; ++row)
            quantize_row(static_cast<const T*>(x) + row * dim, values + row * dim, scales + row,
                         dim);
    });
}
