// Weights in 8 bits as they lie in memory: quantize_weight.cpp makes them, linear_int8.cpp multiplies
// them.
#pragma once

#include "quantized_tile.h"

namespace pagewire {

// One group of a panel: weight = quant * scale + minimum.
struct Int8Weights {
    uint8_t quants[kSteps][kPanel * kStep];
    Float16 scale[kPanel];
    Float16 minimum[kPanel];

    PanelBytes bytes(int64_t step) const { return load_bytes(quants[step]); }
};

}  // namespace pagewire
