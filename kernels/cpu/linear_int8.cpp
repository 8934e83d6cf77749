// W8A8: weights in 8 bits, activations in 8 bits.
#include "functions.h"
#include "int8_weights.h"

using namespace pagewire;

// x: ActivationGroup [rows, num_groups]; weights, bias: as in Matrix, filled up to whole panels;
// out: [rows, out_features].
PAGEWIRE_EXPORT void linear_int8(int64_t dtype, const void* x, const void* weights,
                                 const void* bias, void* out, int64_t rows, int64_t num_groups,
                                 int64_t out_features) {
    const Matrix<Int8Weights> matrix{static_cast<const Int8Weights*>(weights),
                                     static_cast<const float*>(bias), num_groups, out_features};
    multiply(dtype, matrix, x, out, rows);
}
