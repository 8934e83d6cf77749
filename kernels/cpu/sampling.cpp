// Chooses a token a row: temperature, top-k, top-p, min-p and the draw from what these leave.
//
// Nothing is sorted. What is kept are the weights from a threshold up, and that threshold is found
// by bisection over the bits of a float, mostly among the few hundred largest weights.
#include "vocabulary.h"

namespace pagewire {
namespace {

constexpr int64_t kNoToken = -1;

// How the token of one row is chosen; see SamplingRows in ops.py.
struct Choice {
    float temperature;
    int64_t top_k;
    double top_p;
    float min_p;
    double uniform;
};

float float_of(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

int32_t bits_of(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// All weights of a row, or only the largest: enough to tell which of all are kept.
struct Weights {
    const float* values;
    int64_t size;
    double sum;
};

// The largest bound whose Mass `reaches` accepts; what it accepts it must accept of more mass too,
// and `floor`, below which it does not look, it must accept. Weights are 0 to 1, and such floats
// are in the order of their bits, so this bisects integers. Once half of the weights are not
// between the two ends, only the others are looked at: they are copied to `between` [size].
template <typename Reaches>
float largest_bound(const Weights& weights, float* between, float floor, Reaches reaches) {
    constexpr int64_t kFew = 2048;
    const float* values = weights.values;
    int64_t size = weights.size;
    int32_t low = bits_of(floor), high = bits_of(1.0f) + 1;
    Mass from_low = {size, 0.0}, from_high = {};  // of the weights that reach them
    Mass copied = {};  // of those weights that reach `high` and are not in `values` any more
    while (high - low > 1) {
        const int32_t middle = low + (high - low) / 2;
        const Mass mass = copied + mass_at_least(values, size, float_of(middle));
        const bool is_low = reaches(mass);
        (is_low ? low : high) = middle;
        (is_low ? from_low : from_high) = mass;
        if (size > kFew && (from_low.count - from_high.count) * 2 <= size) {
            size = copy_between(values, size, float_of(low), float_of(high), between);
            values = between;
            copied = from_high;
        }
    }
    return float_of(low);
}

// The smallest weight that top-k keeps, and what the k largest weigh.
struct TopK {
    float least;
    double sum;
};

TopK find_top_k(const Weights& weights, float* between, int64_t k) {
    const float least = largest_bound(weights, between, 0.0f,
                                      [&](const Mass& mass) { return mass.count >= k; });
    const Mass above =
        mass_at_least(weights.values, weights.size, std::nextafter(least, kInfinity));
    return {least, above.sum + static_cast<double>(k - above.count) * least};
}

// The smallest weight that top-p keeps: a token is kept while those before it weigh less than
// `wanted`.
float find_top_p(const Weights& weights, float* between, double wanted) {
    // All weights below the mean of what is not wanted cannot be more than that, so they are not
    // needed; half of that mean, as sums are rounded.
    const double floor = std::max(0.0, weights.sum - wanted) / (2 * weights.size);
    return largest_bound(weights, between, static_cast<float>(floor),
                         [&](const Mass& mass) { return mass.sum >= wanted; });
}

// The smallest weight that top-p keeps of `total`, what all weights of the row sum to; with top-k,
// the smallest that top-k keeps and top-p of what that leaves.
float find_least(const Weights& weights, float* between, const Choice& choice, bool has_top_k,
                 double total) {
    float least = 0.0f;
    if (has_top_k) {
        const TopK top_k = find_top_k(weights, between, choice.top_k);
        least = top_k.least;
        total = top_k.sum;
    }
    if (choice.top_p < 1.0)
        least = std::max(least, find_top_p(weights, between, choice.top_p * total));
    return least;
}

// Below `total`, or the rounding of the product could point behind the last token.
double target_of(double uniform, double total) {
    return std::min(uniform * total, std::nextafter(total, 0.0));
}

// The index at which the cumulative weight of those that reach `least` passes `uniform` of their
// sum, in two levels: which block of tokens, then which token in it.
int64_t draw(const Weights& weights, float least, double uniform) {
    constexpr int64_t kBlock = 512;
    const float* values = weights.values;
    const int64_t size = weights.size;
    const auto block_sum = [&](int64_t begin) {
        return mass_at_least(values + begin, std::min(kBlock, size - begin), least).sum;
    };
    double total = 0.0;
    for (int64_t begin = 0; begin < size; begin += kBlock) total += block_sum(begin);
    const double target = target_of(uniform, total);
    int64_t begin = 0;
    double passed = 0.0, inside = block_sum(0);
    while (passed + inside <= target) {
        passed += inside;
        begin += kBlock;
        inside = block_sum(begin);
    }

    const int64_t end = std::min(begin + kBlock, size);
    const auto weight = [&](int64_t i) { return values[i] >= least ? values[i] : 0.0; };
    double block_total = 0.0;
    for (int64_t i = begin; i < end; ++i) block_total += weight(i);
    const double rest = target_of((target - passed) / inside, block_total);
    int64_t token = begin;
    for (double passing = weight(token); passing <= rest; passing += weight(token)) ++token;
    return token;
}

// exp((logits - highest) / temperature); `to` may be `logits`.
Weights weights_of(const float* logits, int64_t size, float highest, float temperature, float* to) {
    weigh(logits, size, highest, temperature, to);
    return {to, size, mass_at_least(to, size, 0.0f).sum};
}

// `highest` is the largest of the row's logits, and finite.
int64_t draw_row(const float* logits, int64_t size, float highest, const Choice& choice,
                 Scratch& scratch) {
    const bool has_top_k = choice.top_k < size, has_top_p = choice.top_p < 1.0;
    const auto draw_from = [&](const Weights& weights, double total) {
        const float least = find_least(weights, scratch.between.get(), choice, has_top_k, total);
        return draw(weights, std::max(least, choice.min_p), choice.uniform);
    };
    const int64_t groups = num_groups(size);
    const int64_t rank = has_top_k ? choice.top_k : groups / 4 * 3;
    if ((has_top_k || has_top_p) && rank <= groups) {
        // Top-k seldom needs the sum, and top-p no single weight of those that it does not keep.
        const double total =
            has_top_k ? 0.0 : sum_of_weights(logits, size, highest, choice.temperature);
        float* listed = scratch.listed.get();
        const int64_t count = copy_largest(logits, size, scratch.maxima.get(), rank, listed,
                                           scratch.ids.get());
        const Weights largest = weights_of(listed, count, highest, choice.temperature, listed);
        if (has_top_k || largest.sum >= choice.top_p * total)
            return scratch.ids[draw_from(largest, total)];
    }
    const Weights all =
        weights_of(logits, size, highest, choice.temperature, scratch.weights.get());
    return draw_from(all, all.sum);
}

int64_t choose_row(const float* logits, int64_t size, const Choice& choice, Scratch& scratch) {
    const float highest = group_maxima(logits, size, scratch.maxima.get());
    if (!std::isfinite(highest)) return kNoToken;
    if (choice.temperature == 0.0f) return first_of(highest, logits, size, scratch.maxima.get());
    return draw_row(logits, size, highest, choice, scratch);
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// logits: [rows, size]; of each row temperature, top_k, top_p, min_p and uniform, a random number
// of [0, 1). tokens: [rows], -1 where the largest logit is not finite or any is NaN.
PAGEWIRE_EXPORT void sample(const float* logits, const float* temperature, const int64_t* top_k,
                            const double* top_p, const float* min_p, const double* uniform,
                            int64_t* tokens, int64_t rows, int64_t size) {
#pragma omp parallel if (rows > 1 && rows * size > kSerialElements)
    {
        Scratch scratch(size);
#pragma omp for schedule(dynamic)
        for (int64_t row = 0; row < rows; ++row)
            tokens[row] = choose_row(
                logits + row * size, size,
                {temperature[row], top_k[row], top_p[row], min_p[row], uniform[row]}, scratch);
    }
}
