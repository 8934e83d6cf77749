// The paged KV cache as kernels address it: KVPool in kv_pool.py.
#pragma once

#include "common.h"

namespace pagewire {

// A segment for each page, layer and KV head: [K|V][slot][head_dim] and, where values have 8 bits,
// their scales behind them, float32 [K|V][slot].
struct KVPool {
    char* data;
    int64_t num_layers;
    int64_t num_kv_heads;
    int64_t page_size;
    int64_t head_dim;
    int64_t segment_bytes;
};

template <typename KV>
constexpr bool is_quantized = std::is_same_v<KV, int8_t>;

template <typename KV>
struct KVSegment {
    KV* keys;             // [page_size, head_dim]
    KV* values;           // [page_size, head_dim]
    float* key_scales;    // [page_size]; null unless quantised
    float* value_scales;  // [page_size]; null unless quantised
};

template <typename KV>
KVSegment<KV> segment_at(const KVPool& pool, int64_t page, int64_t layer, int64_t kv_head) {
    const int64_t index = (page * pool.num_layers + layer) * pool.num_kv_heads + kv_head;
    KV* keys = reinterpret_cast<KV*>(pool.data + index * pool.segment_bytes);
    KV* values = keys + pool.page_size * pool.head_dim;
    if constexpr (!is_quantized<KV>) return {keys, values, nullptr, nullptr};
    float* scales = reinterpret_cast<float*>(values + pool.page_size * pool.head_dim);
    return {keys, values, scales, scales + pool.page_size};
}

// A K or V of one token and head in 8 bits, symmetric: scale = max |x| / 127, or 1 where all are 0;
// values = x / scale, halves to even.
template <typename T>
void quantize_vector(const T* x, int8_t* values, float* scale, int64_t head_dim) {
    // Compared as integers, magnitudes keep their order and a NaN is above infinity, so that it
    // reaches the scale and no vector with one passes for a sound one.
    Ints largest = {};
    for_each_vector(head_dim, [&](int64_t i, auto load, auto) {
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
    for_each_vector(head_dim, [&](int64_t i, auto load, auto store) {
        store(values + i, load(x + i) / divisor);
    });
}

// Calls body with null pointers to the type that `dtype` names and to that of the pool's values.
template <typename Body>
void dispatch_pool(int64_t dtype, bool quantized, Body body) {
    dispatch(dtype, [&](auto* type) {
        if (quantized)
            body(type, static_cast<int8_t*>(nullptr));
        else
            body(type, type);
    });
}

}  // namespace pagewire
