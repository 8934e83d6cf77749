// Compares the C++ kernels of one build with plain scalar code, and needs no Python: so a build for
// another kind of CPU can run in an emulator. Prints what differs; exits with how many checks failed.
//
// Attention comes as source, for the structs that it takes; everything else is linked.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <numeric>
#include <random>
#include <vector>

#include "attention.cpp"
#include "activation_group.h"

PAGEWIRE_EXPORT void quantize_weight(int64_t dtype, const void* weight, void* to,
                                     int64_t out_features, int64_t in_features);
PAGEWIRE_EXPORT void sample(const float* logits, const float* temperature, const int64_t* top_k,
                            const double* top_p, const float* min_p, const double* uniform,
                            int64_t* tokens, int64_t rows, int64_t size);
PAGEWIRE_EXPORT void logprobs(const float* logits, const int64_t* rows, const int64_t* tokens,
                              double* sampled, int64_t* top_ids, double* top, int64_t count,
                              int64_t size, int64_t num_top);

namespace {

using Values = std::vector<float>;

constexpr double kFloat32Error = 1e-5;
constexpr double kInt8Error = 2e-2;
constexpr int64_t kPanelChannels = 16;  // of quantised matrices
constexpr int64_t kFloatPanelChannels = 32;

int num_failed = 0;

void report(const char* name, int64_t dtype, bool passed, double error) {
    std::printf("%s %s dtype %d (error %.1e)\n", passed ? "ok    " : "FAILED", name,
                static_cast<int>(dtype), error);
    num_failed += !passed;
}

// The largest difference, by the largest magnitude of what is expected.
void expect_close(const char* name, int64_t dtype, const Values& found, const Values& expected,
                  double tolerance) {
    double difference = 0.0, magnitude = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
        const double each = std::abs(double(found[i]) - expected[i]);
        difference = each <= difference ? difference : each;  // a NaN stays
        magnitude = std::max(magnitude, std::abs(double(expected[i])));
    }
    const double error = difference / magnitude;
    report(name, dtype, error <= tolerance, error);
}

template <typename T>
void expect_equal(const char* name, int64_t dtype, const std::vector<T>& found,
                  const std::vector<T>& expected) {
    const size_t num_bytes = expected.size() * sizeof(T);
    const bool equal = std::memcmp(found.data(), expected.data(), num_bytes) == 0;
    report(name, dtype, equal, equal ? 0.0 : 1.0);
}

// ---- storage types, one number at a time --------------------------------------------------------

#if defined(__aarch64__)
using Half = __fp16;
#else
using Half = _Float16;
#endif

float to_float(float x) { return x; }
float to_float(BFloat16 x) {
    const uint32_t bits = uint32_t{x.bits} << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}
float to_float(Float16 x) {
    Half value;
    std::memcpy(&value, &x, sizeof value);
    return value;
}

void assign(float& to, float x) { to = x; }
void assign(BFloat16& to, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    to.bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
void assign(Float16& to, float x) {
    const Half value = x;
    std::memcpy(&to, &value, sizeof to);
}

template <typename T>
T stored(float x) {
    T value;
    assign(value, x);
    return value;
}

template <typename T>
Values floats(const std::vector<T>& values) {
    Values result;
    for (const T& value : values) result.push_back(to_float(value));
    return result;
}

template <typename T>
constexpr double rounding() {
    return std::is_same_v<T, float> ? kFloat32Error : std::is_same_v<T, Float16> ? 1e-3 : 8e-3;
}

// ---- inputs -------------------------------------------------------------------------------------

std::mt19937 generator(0);

template <typename T>
std::vector<T> random(int64_t count, float scale = 1.0f) {
    std::normal_distribution<float> normal(0.0f, scale);
    std::vector<T> values(count);
    for (T& value : values) assign(value, normal(generator));
    return values;
}

// Calls check with a number of each storage type and its code.
template <typename Check>
void for_each_dtype(const Check& check) {
    check(float{}, kFloat32);
    check(BFloat16{}, kBFloat16);
    check(Float16{}, kFloat16);
}

// ---- activations --------------------------------------------------------------------------------

ActivationGroup scalar_group(const float* x, int64_t count, float scale, bool refined) {
    ActivationGroup group = {};
    const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
    int32_t total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const volatile float exact = x[i] * inverse;
        const float value = std::nearbyint(exact);
        const float rest = refined ? std::nearbyint((exact - value) * kRefinement) : 0.0f;
        group.values[i] = value;
        group.remainders[i] = rest;
        total += static_cast<int32_t>(refined ? value * kRefinement + rest : value);
    }
    group.unit = refined ? scale / kRefinement : scale;
    group.sum = total * group.unit;
    group.refined = refined;
    return group;
}

std::vector<ActivationGroup> scalar_quantize(const Values& x, int64_t dim) {
    std::vector<ActivationGroup> groups;
    for (size_t start = 0; start < x.size(); start += dim) {
        Values scales;
        for (int64_t at = 0; at < dim; at += kGroup) {
            float largest = 0.0f;
            for (int64_t i = at; i < std::min(at + kGroup, dim); ++i)
                largest = std::max(largest, std::abs(x[start + i]));
            scales.push_back(largest / 127.0f);
        }
        const double mean = std::accumulate(scales.begin(), scales.end(), 0.0) / scales.size();
        for (size_t g = 0; g < scales.size(); ++g)
            groups.push_back(scalar_group(&x[start + g * kGroup],
                                          std::min<int64_t>(kGroup, dim - g * kGroup), scales[g],
                                          scales[g] > mean * kRefineAbove));
    }
    return groups;
}

float restored(const ActivationGroup& group, int64_t i) {
    const float whole = group.refined ? group.values[i] * kRefinement : group.values[i];
    return (whole + group.remainders[i]) * group.unit;
}

void check_quantize() {
    for_each_dtype([](auto zero, int64_t dtype) {
        using T = decltype(zero);
        const int64_t rows = 3, dim = 115;
        std::vector<T> x = random<T>(rows * dim);
        assign(x[dim + 40], 300.0f);  // its group has remainders
        const auto expected = scalar_quantize(floats(x), dim);
        std::vector<ActivationGroup> groups(expected.size());
        quantize(dtype, x.data(), groups.data(), rows, dim);
        expect_equal("quantize", dtype, groups, expected);
    });
}

void check_norms() {
    for_each_dtype([](auto zero, int64_t dtype) {
        using T = decltype(zero);
        const int64_t rows = 5, dim = 83;
        const auto x = random<T>(rows * dim), weight = random<T>(dim);
        std::vector<T> residual = random<T>(rows * dim), out(rows * dim), sum_out(rows * dim);
        Values expected, sum_expected;
        const auto norm = [&](const Values& row, Values& to) {
            double squares = 0.0;
            for (float value : row) squares += double(value) * value;
            for (int64_t i = 0; i < dim; ++i)
                to.push_back(row[i] / std::sqrt(squares / dim + 1e-5) * to_float(weight[i]));
        };
        for (int64_t r = 0; r < rows; ++r) {
            Values row, sum;
            for (int64_t i = r * dim; i < (r + 1) * dim; ++i) {
                row.push_back(to_float(x[i]));
                sum.push_back(to_float(stored<T>(to_float(x[i]) + to_float(residual[i]))));
            }
            norm(row, expected);
            norm(sum, sum_expected);
        }
        rms_norm(dtype, x.data(), dim, dim, weight.data(), out.data(), nullptr, rows, 1, dim, 1e-5f);
        expect_close("rms_norm", dtype, floats(out), expected, rounding<T>());
        add_rms_norm(dtype, x.data(), residual.data(), weight.data(), sum_out.data(), nullptr, rows,
                     dim, 1e-5f);
        expect_close("add_rms_norm", dtype, floats(sum_out), sum_expected, rounding<T>());
    });
}

void check_silu_mul() {
    for_each_dtype([](auto zero, int64_t dtype) {
        using T = decltype(zero);
        const int64_t rows = 3, dim = 77;
        const auto gate_up = random<T>(rows * 2 * dim, 4.0f);
        std::vector<T> out(rows * dim);
        Values expected;
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < dim; ++i) {
                const double gate = to_float(gate_up[r * 2 * dim + i]);
                expected.push_back(gate / (1.0 + std::exp(-gate)) *
                                   to_float(gate_up[r * 2 * dim + dim + i]));
            }
        silu_mul(dtype, gate_up.data(), out.data(), nullptr, rows, dim);
        expect_close("silu_mul", dtype, floats(out), expected, rounding<T>());
    });
}

// ---- matrices -----------------------------------------------------------------------------------

constexpr int64_t kChannels = 40;  // two and a half panels
constexpr int64_t kFeatures = 96;
constexpr int64_t kRowCounts[] = {1, 2, 9};

// The product with weight(channel, feature), from activations in 8 bits.
Values scalar_product(const std::vector<ActivationGroup>& x, int64_t rows,
                      const std::function<double(int64_t, int64_t)>& weight) {
    Values expected;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t n = 0; n < kChannels; ++n) {
            double sum = 0.0;
            for (int64_t i = 0; i < kFeatures; ++i)
                sum += restored(x[r * (kFeatures / kGroup) + i / kGroup], i % kGroup) * weight(n, i);
            expected.push_back(sum);
        }
    return expected;
}

template <typename Multiply>
void check_quantized(const char* name, const std::vector<uint8_t>& panels, const Multiply& multiply,
                     const std::function<double(int64_t, int64_t)>& weight) {
    const Values bias(3 * kPanelChannels);
    for (int64_t rows : kRowCounts) {
        Values values = random<float>(rows * kFeatures);
        values[3] = 200.0f;
        const auto x = scalar_quantize(values, kFeatures);
        const Values expected = scalar_product(x, rows, weight);
        Values out(rows * kChannels);
        multiply(kFloat32, x.data(), panels.data(), bias.data(), out.data(), rows,
                 kFeatures / kGroup, kChannels);
        expect_close(name, kFloat32, out, expected, kFloat32Error);
    }
}

float half_at(const uint8_t* from) {
    Float16 half;
    std::memcpy(&half, from, sizeof half);
    return to_float(half);
}

// A group of a panel has so many bytes of quants, then the scales and minima of its channels.
struct PanelGroup {
    const uint8_t* bytes;
    int64_t quant_bytes;

    PanelGroup(const std::vector<uint8_t>& panels, int64_t quant_bytes, int64_t channel,
               int64_t feature)
        : bytes(panels.data() +
                (channel / kPanelChannels * (kFeatures / kGroup) + feature / kGroup) *
                    (quant_bytes + 4 * kPanelChannels)),
          quant_bytes(quant_bytes) {}

    double weight(int64_t channel, int64_t quant) const {
        const uint8_t* scales = bytes + quant_bytes + channel % kPanelChannels * 2;
        return quant * double(half_at(scales)) + half_at(scales + 2 * kPanelChannels);
    }
};

void check_int8() {
    const Values weight = random<float>(kChannels * kFeatures);
    std::vector<uint8_t> panels(3 * (kFeatures / kGroup) * kPanelChannels * (kGroup + 4));
    quantize_weight(kFloat32, weight.data(), panels.data(), kChannels, kFeatures);
    const auto quantized = [&](int64_t channel, int64_t feature) {
        const int64_t quant_bytes = kPanelChannels * kGroup, i = feature % kGroup;
        const PanelGroup group(panels, quant_bytes, channel, feature);
        const int64_t byte = i / 4 * 4 * kPanelChannels + channel % kPanelChannels * 4 + i % 4;
        return group.weight(channel, group.bytes[byte]);
    };
    Values restored_weight;
    for (int64_t n = 0; n < kChannels; ++n)
        for (int64_t i = 0; i < kFeatures; ++i) restored_weight.push_back(quantized(n, i));
    expect_close("quantize_weight", kFloat32, restored_weight, weight, 5e-3);
    check_quantized("linear_int8", panels, linear_int8, quantized);
}

void check_int4() {
    const int64_t quant_bytes = kPanelChannels * kGroup / 2;
    std::vector<uint8_t> panels;
    for (int64_t group = 0; group < 3 * (kFeatures / kGroup); ++group) {
        for (int64_t i = 0; i < quant_bytes; ++i) panels.push_back(generator() & 255);
        const auto halves = random<Float16>(2 * kPanelChannels);
        const auto* bytes = reinterpret_cast<const uint8_t*>(halves.data());
        panels.insert(panels.end(), bytes, bytes + 4 * kPanelChannels);
    }
    check_quantized("linear_int4", panels, linear_int4, [&](int64_t channel, int64_t feature) {
        const PanelGroup group(panels, quant_bytes, channel, feature);
        const int64_t i = feature % kGroup;
        const int64_t byte = i / 8 * 4 * kPanelChannels + channel % kPanelChannels * 4 + i % 4;
        return group.weight(channel, i % 8 < 4 ? group.bytes[byte] & 15 : group.bytes[byte] >> 4);
    });
}

// Where linear_float reads a weight: bfloat16 has the channels of both halves of a panel in turns.
int64_t float_place(int64_t channel, int64_t feature, bool in_turns) {
    const int64_t n = channel % kFloatPanelChannels, half = kFloatPanelChannels / 2;
    return (channel / kFloatPanelChannels * kFeatures + feature) * kFloatPanelChannels +
           (in_turns ? n % half * 2 + n / half : n);
}

template <typename T>
void check_linear_float(int64_t dtype) {
    const auto weight = random<T>(2 * kFloatPanelChannels * kFeatures);
    const Values bias = random<float>(2 * kFloatPanelChannels);
    for (int64_t rows : kRowCounts) {
        const auto x = random<T>(rows * kFeatures);
        Values expected, out(rows * kChannels);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t n = 0; n < kChannels; ++n) {
                double sum = bias[n];
                for (int64_t i = 0; i < kFeatures; ++i)
                    sum += double(to_float(x[r * kFeatures + i])) *
                           to_float(weight[float_place(n, i, dtype == kBFloat16)]);
                expected.push_back(sum);
            }
        linear_float(dtype, kFloat32, x.data(), weight.data(), bias.data(), out.data(), rows,
                     kFeatures, kChannels);
        expect_close("linear_float", dtype, out, expected, kFloat32Error);
    }
}

// ---- attention ----------------------------------------------------------------------------------

constexpr int64_t kHeads = 6, kKVHeads = 2, kHeadDim = 24, kPageSize = 16, kNumPages = 8;

// Keys and values of kNumPages pages of one layer, in floats and as a pool has them.
struct Cache {
    bool quantized;  // the pool's values have 8 bits
    int64_t segment_bytes;
    Values keys, values;  // [kv_head][position][head_dim]
    std::vector<char> pool;
    std::vector<int32_t> pages;  // of the only row, in an order of their own
    static constexpr int64_t kLength = kNumPages * kPageSize;

    Cache(int64_t item_size, bool quantized)
        : quantized(quantized),
          segment_bytes(2 * kPageSize * (quantized ? kHeadDim + 4 : kHeadDim * item_size)),
          keys(kKVHeads * kLength * kHeadDim),
          values(keys.size()),
          pool(kNumPages * kKVHeads * segment_bytes) {
        for (int32_t page = kNumPages - 1; page >= 0; --page) pages.push_back(page);
    }
    int64_t slot(int64_t position) const {
        return pages[position / kPageSize] * kPageSize + position % kPageSize;
    }
};

// Fills a cache through rope_and_store, and checks the queries that it turns.
template <typename T>
Cache filled_cache(int64_t dtype, bool quantized) {
    Cache cache(sizeof(T), quantized);
    const int64_t length = cache.kLength, half = kHeadDim / 2;
    const auto q = random<T>(length * kHeads * kHeadDim), k = random<T>(length * kKVHeads * kHeadDim),
               v = random<T>(length * kKVHeads * kHeadDim);
    Values cosine, sine, expected(length * kHeads * kHeadDim);
    std::vector<int64_t> slots;
    for (int64_t position = 0; position < length; ++position) {
        slots.push_back(cache.slot(position));
        for (int64_t i = 0; i < half; ++i) {
            cosine.push_back(std::cos(position * std::pow(1e4, -double(i) / half)));
            sine.push_back(std::sin(position * std::pow(1e4, -double(i) / half)));
        }
    }
    const auto turn = [&](const T* from, int64_t position, float* to) {
        for (int64_t i = 0; i < half; ++i) {
            const double c = cosine[position * half + i], s = sine[position * half + i];
            to[i] = to_float(from[i]) * c - to_float(from[half + i]) * s;
            to[half + i] = to_float(from[half + i]) * c + to_float(from[i]) * s;
        }
    };
    for (int64_t position = 0; position < length; ++position) {
        for (int64_t head = 0; head < kHeads; ++head) {
            const int64_t at = (position * kHeads + head) * kHeadDim;
            turn(&q[at], position, &expected[at]);
        }
        for (int64_t head = 0; head < kKVHeads; ++head) {
            const T* key = &k[(position * kKVHeads + head) * kHeadDim];
            turn(key, position, &cache.keys[(head * length + position) * kHeadDim]);
            for (int64_t i = 0; i < kHeadDim; ++i)
                cache.values[(head * length + position) * kHeadDim + i] =
                    to_float(v[(position * kKVHeads + head) * kHeadDim + i]);
        }
    }
    std::vector<T> out(q.size());
    rope_and_store(dtype, q.data(), kHeads * kHeadDim, k.data(), kKVHeads * kHeadDim, v.data(),
                   kKVHeads * kHeadDim, cosine.data(), sine.data(), cache.pool.data(), slots.data(),
                   out.data(), length, kHeads, kKVHeads, kHeadDim, 1, 0, kPageSize,
                   cache.segment_bytes, quantized);
    expect_close("rope_and_store", dtype, floats(out), expected, rounding<T>());
    return cache;
}

// The last `num_tokens` of the cache's row, whose contexts are split into `num_parts`.
template <typename T>
void check_attention(const Cache& cache, int64_t dtype, int64_t num_tokens, int64_t num_parts) {
    const int64_t length = cache.kLength, group = kHeads / kKVHeads, first = length - num_tokens;
    const auto q = random<T>(num_tokens * kHeads * kHeadDim);
    const float scale = 1.0f / std::sqrt(float(kHeadDim));
    Values expected(q.size());
    for (int64_t row = 0; row < num_tokens * kHeads; ++row) {
        const int64_t context = first + row / kHeads + 1, head = row % kHeads / group;
        const T* query = &q[row * kHeadDim];
        std::vector<double> sums(kHeadDim);
        double total = 0.0;
        for (int64_t position = 0; position < context; ++position) {
            const int64_t at = (head * length + position) * kHeadDim;
            double score = 0.0;
            for (int64_t i = 0; i < kHeadDim; ++i) score += to_float(query[i]) * cache.keys[at + i];
            const double weight = std::exp(score * scale);
            total += weight;
            for (int64_t i = 0; i < kHeadDim; ++i) sums[i] += weight * cache.values[at + i];
        }
        for (int64_t i = 0; i < kHeadDim; ++i) expected[row * kHeadDim + i] = sums[i] / total;
    }
    std::vector<Item> items;
    for (int64_t part = 0; part < num_parts; ++part)
        items.push_back({0, 0, num_tokens, first, length * part / num_parts,
                         length * (part + 1) / num_parts, num_parts == 1 ? -1 : part});
    const Merge merge = {0, num_tokens, 0, num_parts};
    Step step = {};
    step.dtype = dtype;
    step.num_heads = kHeads;
    step.num_kv_heads = kKVHeads;
    step.head_dim = kHeadDim;
    step.page_size = kPageSize;
    step.num_layers = 1;
    step.segment_bytes = cache.segment_bytes;
    step.quantized = cache.quantized;
    step.page_table = cache.pages.data();
    step.max_pages = kNumPages;
    step.items = items.data();
    step.num_items = items.size();
    step.merges = &merge;
    step.num_merges = num_parts > 1;
    step.max_rows = num_tokens * group;
    step.window = length;
    step.scale = scale;
    step.num_threads = 1;
    attention_sizes(&step);
    Values parts(num_parts * kKVHeads * step.part_size + kLanes), scratch(step.thread_size + kLanes);
    const auto aligned = [](float* at) {
        return reinterpret_cast<float*>(round_up(reinterpret_cast<int64_t>(at), 4 * kLanes));
    };
    step.parts = aligned(parts.data());
    step.scratch = aligned(scratch.data());
    std::vector<T> out(q.size());
    paged_attention(&step, q.data(), kHeads * kHeadDim, const_cast<char*>(cache.pool.data()), 0,
                    out.data());
    const char* name = cache.quantized ? "paged_attention, 8-bit KV" : "paged_attention";
    expect_close(name, dtype, floats(out), expected,
                 4 * rounding<T>() + (cache.quantized ? kInt8Error : 0.0));
}

void check_attention() {
    for_each_dtype([](auto zero, int64_t dtype) {
        using T = decltype(zero);
        for (bool quantized : {false, true}) {
            const Cache cache = filled_cache<T>(dtype, quantized);
            check_attention<T>(cache, dtype, 1, 1);
            check_attention<T>(cache, dtype, 1, 3);
            check_attention<T>(cache, dtype, 21, 1);
        }
    });
}

// ---- sampling -----------------------------------------------------------------------------------

void check_sampling() {
    const int64_t size = 1003, rows = 3, likely = 700;
    Values logits = random<float>(rows * size, 2.0f);
    for (int64_t row = 0; row < rows; ++row) logits[row * size + likely + row] = 20.0f;
    const Values temperature = {0.0f, 1.0f, 100.0f}, min_p(rows);
    const std::vector<int64_t> top_k = {size, size, 1}, numbers = {0, 1, 2};
    const std::vector<double> top_p(rows, 1.0), uniform(rows, 0.5);
    const std::vector<int64_t> expected = {likely, likely + 1, likely + 2};
    std::vector<int64_t> tokens(rows), top_ids(rows);
    sample(logits.data(), temperature.data(), top_k.data(), top_p.data(), min_p.data(),
           uniform.data(), tokens.data(), rows, size);
    expect_equal("sample", kFloat32, tokens, expected);

    std::vector<double> sampled(rows), top(rows);
    logprobs(logits.data(), numbers.data(), tokens.data(), sampled.data(), top_ids.data(),
             top.data(), rows, size, 1);
    Values logprob;
    for (int64_t row = 0; row < rows; ++row) {
        double total = 0.0;
        for (int64_t i = 0; i < size; ++i) total += std::exp(double(logits[row * size + i]) - 20.0);
        logprob.push_back(1.0 - std::log(total));  // moved by 1: the likely token's are nearly 0
    }
    Values found;
    for (double value : sampled) found.push_back(1.0 + value);
    expect_close("logprobs", kFloat32, found, logprob, kFloat32Error);
    expect_equal("logprobs, most likely", kFloat32, top_ids, expected);
}

}  // namespace

int main() {
    check_quantize();
    check_norms();
    check_silu_mul();
    check_int8();
    check_int4();
    check_linear_float<float>(kFloat32);
    check_linear_float<BFloat16>(kBFloat16);
    check_attention();
    check_sampling();
    return num_failed;
}
