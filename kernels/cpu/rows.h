// Kernels that make one row per token, plain or quantised to 8 bits on the way out.
#pragma once

#include <vector>

#include "activation_group.h"
#include "common.h"

namespace pagewire {

// Rows go to `out` [rows, dim], or, where that is null, to `groups` [rows, dim / kGroup].
struct Output {
    void* out;
    ActivationGroup* groups;
};

// Calls compute(row, to) for every row; it has to write `dim` elements to `to`.
template <typename T, typename Compute>
void for_each_row(int64_t rows, int64_t dim, const Output& output, Compute compute) {
    const bool quantized = output.out == nullptr;
    const int64_t num_groups = (dim + kGroup - 1) / kGroup;
#pragma omp parallel if (rows > 1 && rows * dim > kSerialElements)
    {
        // A row stays in the first-level cache between its two passes.
        std::vector<T> scratch(quantized ? dim : 0);
#pragma omp for
        for (int64_t row = 0; row < rows; ++row) {
            T* to = quantized ? scratch.data() : static_cast<T*>(output.out) + row * dim;
            compute(row, to);
            if (quantized) quantize_row(to, output.groups + row * num_groups, dim);
        }
    }
}

}  // namespace pagewire
