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
