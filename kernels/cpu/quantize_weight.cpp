// Weights to 8 bits with a scale and a minimum for each group of 32 input features of a channel,
// written as linear_int8.cpp reads them. To the bit what `quantize_weight` in int8_linear.py makes.
#include "int8_weights.h"
#include "unroll.h"

namespace pagewire {
namespace {

constexpr float kLevels = 255.0f;

// One group of kLanes channels side by side: all that follows is computed for each of them alone.
struct Group {
    Floats weights[kGroup];
};

// What the weights of a group are rounded to: minimum + quant * scale. Both are float16 numbers.
struct Levels {
    Floats scale;
    Floats minimum;
};

struct Candidate {
    Levels levels;
    Floats quants[kGroup];
    Floats error;  // sum of squares
};

// The first `count` features of `num_channels` rows, `stride` apart; the others are 0.
template <typename T>
inline void load_group(Group& group, const T* from, int64_t stride, int64_t num_channels,
                       int64_t count) {
    float rows[kLanes][kGroup] = {};
    for (int64_t channel = 0; channel < num_channels; ++channel) {
        const T* row = from + channel * stride;
        for_each_vector(count, [&](int64_t i, auto load, auto store) {
            store(rows[channel] + i, load(row + i));
        });
    }
    for (int64_t i = 0; i < kGroup; ++i)
        for (int64_t lane = 0; lane < kLanes; ++lane) group.weights[i][lane] = rows[lane][i];
}

// The larger one; NaN where either is.
inline Floats larger(Floats a, Floats b) {
    return (a > b) | (a != a) ? a : b;
}

inline Floats in_float16(Floats values) {
    Float16 halves[kLanes];
    store(halves, values);
    return load(halves);
}

// Adds the upper half of the features to the lower one until one is left, as torch code can, too.
inline Floats sum_by_halves(Floats (&values)[kGroup]) {
    for (int64_t half = kGroup / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; ++i) values[i] += values[i + half];
    return values[0];
}

inline void round_to(Candidate& candidate, const Group& group) {
    const Floats scale = candidate.levels.scale, minimum = candidate.levels.minimum;
    const Floats step = scale == 0.0f ? broadcast(1.0f) : scale;
    const Floats lowest = Floats{}, highest = broadcast(kLevels);
    Floats squares[kGroup];
    for (int64_t i = 0; i < kGroup; ++i) {
        const Floats exact = (group.weights[i] - minimum) / step;
        const Floats positive = exact < lowest ? lowest : exact;
        const Floats quant = round_to_even(positive > highest ? highest : positive);
        // A quant and a float16 have so few bits that their product is exact.
        const Floats error = minimum + quant * scale - group.weights[i];
        candidate.quants[i] = quant;
        squares[i] = rounded(error * error);
    }
    candidate.error = sum_by_halves(squares);
}

// The levels lie between the smallest and the largest weight, or symmetrically around 0.
inline void round_group(const Group& group, Candidate& between, Candidate& around) {
    Floats low = -group.weights[0], high = group.weights[0];  // `low` with its sign changed
    for (int64_t i = 1; i < kGroup; ++i) {
        low = larger(-group.weights[i], low);
        high = larger(group.weights[i], high);
    }
    const Floats symmetric = in_float16(larger(low, high) / 127.0f);
    between.levels = {in_float16((high + low) / kLevels), in_float16(-low)};
    around.levels = {symmetric, in_float16(symmetric * -128.0f)};
    round_to(between, group);
    round_to(around, group);
}

// Writes what loses less to the channels from `channel` on.
inline void write(Int8Weights* to, int64_t channel, const Candidate& between,
                  const Candidate& around) {
    const auto symmetric = around.error < between.error;
    for (int64_t step = 0; step < kSteps; ++step) {
        Ints word = {};  // the quants of kStep features, the first in the lowest byte
        UNROLL for (int64_t j = 0; j < kStep; ++j) {
            const int64_t i = step * kStep + j;
            word |= nearest_integers(symmetric ? around.quants[i] : between.quants[i]) << (8 * j);
        }
        std::memcpy(to->quants[step] + channel * kStep, &word, sizeof word);
    }
    store(to->scale + channel, symmetric ? around.levels.scale : between.levels.scale);
    store(to->minimum + channel, symmetric ? around.levels.minimum : between.levels.minimum);
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// weight: [out_features, in_features]; to: Int8Weights [num_panels, num_groups], both rounded up.
// Channels and features behind the last ones are weights of 0.
PAGEWIRE_EXPORT void quantize_weight(int64_t dtype, const void* weight, void* to,
                                     int64_t out_features, int64_t in_features) {
    const int64_t num_groups = (in_features + kGroup - 1) / kGroup;
    const int64_t num_panels = (out_features + kPanel - 1) / kPanel;
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for if (out_features * in_features > kSerialElements)
        for (int64_t panel = 0; panel < num_panels; ++panel) {
            Int8Weights* groups = static_cast<Int8Weights*>(to) + panel * num_groups;
            for (int64_t channel = 0; channel < kPanel; channel += kLanes) {
                const int64_t row = panel * kPanel + channel;
                const int64_t num_channels = std::clamp(out_features - row, int64_t{0}, kLanes);
                const T* from = static_cast<const T*>(weight) + row * in_features;
                for (int64_t index = 0; index < num_groups; ++index) {
                    const int64_t at = index * kGroup;
                    Group group;
                    load_group(group, from + at, in_features, num_channels,
                               std::min(kGroup, in_features - at));
                    Candidate between, around;
                    round_group(group, between, around);
                    write(groups + index, channel, between, around);
                }
            }
        }
    });
}
