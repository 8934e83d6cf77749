// What stands between two matrices: SiLU(gate) * up, and 8-bit quantisation.
#include "functions.h"
#include "rows.h"

using namespace pagewire;

// gate_up: [rows, 2 * dim], gate first; output: [rows, dim].
PAGEWIRE_EXPORT void silu_mul(int64_t dtype, const void* gate_up, void* out, void* groups,
                              int64_t rows, int64_t dim) {
    const Output output{out, static_cast<ActivationGroup*>(groups)};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_each_row<T>(rows, dim, output, [&](int64_t row, T* to) {
            const T* gate = static_cast<const T*>(gate_up) + row * 2 * dim;
            const T* up = gate + dim;
            for_each_vector(dim, [&](int64_t i, auto load, auto store) {
                const Floats x = load(gate + i);
                store(to + i, x / (1.0f + exp(-x)) * load(up + i));
            });
        });
    });
}

// x: [rows, dim]; groups: [rows, dim / kGroup, rounded up].
PAGEWIRE_EXPORT void quantize(int64_t dtype, const void* x, void* groups, int64_t rows,
                              int64_t dim) {
    const int64_t num_groups = (dim + kGroup - 1) / kGroup;
    ActivationGroup* to = static_cast<ActivationGroup*>(groups);
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for if (rows > 1 && rows * dim > kSerialElements)
        for (int64_t row = 0; row < rows; ++row)
            quantize_row(static_cast<const T*>(x) + row * dim, to + row * num_groups, dim);
    });
}
