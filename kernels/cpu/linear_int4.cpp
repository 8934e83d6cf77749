// W4A8: weights in GGUF's blocks of 4 bits, activations in 8 bits. A block is a group of 32 features
// with a scale and a minimum, as Q4_1 has them; Q4_0 is the case minimum = -8 scale.
#include "functions.h"
#include "quantized_tile.h"

namespace pagewire {
namespace {

// One group of a panel.
struct Int4Weights {
    uint8_t quants[kSteps / 2][kPanel * kStep];  // an even step in the low halves, the next in the high
    Float16 scale[kPanel];
    Float16 minimum[kPanel];

    PanelBytes bytes(int64_t step) const {
        const PanelBytes both = load_bytes(quants[step / 2]);
        return step % 2 == 0 ? both & 15 : both >> 4;
    }
};

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// x: ActivationGroup [rows, num_groups]; weights, bias: as in Matrix, filled up to whole panels;
// out: [rows, out_features].
PAGEWIRE_EXPORT void linear_int4(int64_t dtype, const void* x, const void* weights,
                                 const void* bias, void* out, int64_t rows, int64_t num_groups,
                                 int64_t out_features) {
    const Matrix<Int4Weights> matrix{static_cast<const Int4Weights*>(weights),
                                     static_cast<const float*>(bias), num_groups, out_features};
    multiply(dtype, matrix, x, out, rows);
}
