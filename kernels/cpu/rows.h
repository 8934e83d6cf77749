// Kernels that make one row per token, plain or quantised to 8 bits on the way out.
#pragma once

#include <vector>

#include "common.h"

namespace pagewire {

// Symmetric: scale = max |x| / 127, or 1 where all are 0; values = x / scale, halves to even.
template <typename T>
void quantize_row(const T* x, int8_t* values, float* scale, int64_t dim) {
    // Compared as integers, magnitudes keep their order and a NaN is above infinity, so that it
    // reaches the scale and no row with one passes for a sound one.
    Ints largest = {};
    for_each_vector(dim, [&](int64_t i, auto load, auto) {
        const Ints magnitude = (Ints)load(x + i) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
    });
    int32_t bits = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane)
        if (largest[lane] > bits) bits = largest[lane];
    float absmax;
    std::memcpy(&absmax, &bits, sizeof absmax);
    *scale = absmax / 127.0f;
    if (*scale == 0.0f) *scale = 1.0f;
    const Floats divisor = broadcast(*scale);
    for_each_vector(dim, [&](int64_t i, auto load, auto store) {
        store(values + i, round_to_even(load(x + i) / divisor));
    });
}

// Rows go to `out` [rows, dim], or, where that is null, to `values` [rows, dim] and `scales` [rows].
struct Output {
    void* out;
    int8_t* values;
    float* scales;
};

// Calls compute(row, to) for every row; it has to write `dim` elements to `to`.
template <typename T, typename Compute>
void for_each_row(int64_t rows, int64_t dim, const Output& output, Compute compute) {
    const bool quantized = output.out == nullptr;
#pragma omp parallel if (rows > 1 && rows * dim > kSerialElements)
    {
        // A row stays in the first-level cache between its two passes.
        std::vector<T> scratch(quantized ? dim : 0);
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            T* to = quantized ? scratch.data() : static_cast<T*>(output.out) + row * dim;
            compute(row, to);
            if (quantized)
                quantize_row(to, output.values + row * dim, output.scales + row, dim);
        }
    }
}

}  // namespace pagewire
