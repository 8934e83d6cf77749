// Rotary position embedding (Su et al., 2021) of queries and keys, and keys and values into pages.
#include <vector>

#include "functions.h"
#include "kv_pool.h"

namespace pagewire {
namespace {

// Turns the two halves of a head against each other; to: [2 * half].
template <typename T, typename To>
void rotate_head(const T* x, const float* cosine, const float* sine, To* to, int64_t half) {
    for_each_vector(half, [&](int64_t i, auto load, auto store) {
        const Floats first = load(x + i), second = load(x + half + i);
        const Floats c = load(cosine + i), s = load(sine + i);
        store(to + i, first * c - second * s);
        store(to + half + i, second * c + first * s);
    });
}

// One token's K, rotated, and V of one head into a slot of its segment. An 8-bit K is rounded once,
// from the rotated floats; scratch: head_dim floats.
template <typename T, typename KV>
void store_head(const T* k, const T* v, const float* cosine, const float* sine,
                const KVSegment<KV>& segment, int64_t slot, int64_t head_dim, float* scratch) {
    KV* key = segment.keys + slot * head_dim;
    KV* value = segment.values + slot * head_dim;
    if constexpr (is_quantized<KV>) {
        rotate_head(k, cosine, sine, scratch, head_dim / 2);
        quantize_vector(scratch, key, segment.key_scales + slot, head_dim);
        quantize_vector(v, value, segment.value_scales + slot, head_dim);
    } else {
        rotate_head(k, cosine, sine, key, head_dim / 2);
        std::memcpy(value, v, head_dim * sizeof(T));
    }
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// q: [num_tokens, num_heads, head_dim], k and v: [num_tokens, num_kv_heads, head_dim], each with a
// stride between its tokens, so that all three may be parts of one tensor; cosine, sine: [num_tokens,
// head_dim / 2]; data: a KVPool of int8 if `quantized`, else of `dtype`; slots: [num_tokens], page *
// page_size + offset; out: [num_tokens, num_heads, head_dim].
PAGEWIRE_EXPORT void rope_and_store(int64_t dtype, const void* q, int64_t q_stride, const void* k,
                                    int64_t k_stride, const void* v, int64_t v_stride,
                                    const float* cosine, const float* sine, void* data,
                                    const int64_t* slots, void* out, int64_t num_tokens,
                                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                    int64_t num_layers, int64_t layer, int64_t page_size,
                                    int64_t segment_bytes, int64_t quantized) {
    const KVPool pool = {static_cast<char*>(data), num_layers, num_kv_heads,
                         page_size,                head_dim,   segment_bytes};
    dispatch_pool(dtype, quantized, [&](auto* type, auto* kv_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using KV = std::remove_pointer_t<decltype(kv_type)>;
        const int64_t half = head_dim / 2;
#pragma omp parallel if (num_tokens * (num_heads + 2 * num_kv_heads) * head_dim > kSerialElements)
        {
            std::vector<float> scratch(is_quantized<KV> ? head_dim : 0);
#pragma omp for
            for (int64_t token = 0; token < num_tokens; ++token) {
                const float* c = cosine + token * half;
                const float* s = sine + token * half;
                const T* from = static_cast<const T*>(q) + token * q_stride;
                T* rotated = static_cast<T*>(out) + token * num_heads * head_dim;
                for (int64_t head = 0; head < num_heads; ++head)
                    rotate_head(from + head * head_dim, c, s, rotated + head * head_dim, half);

                const int64_t page = slots[token] / page_size, slot = slots[token] % page_size;
                const T* keys = static_cast<const T*>(k) + token * k_stride;
                const T* values = static_cast<const T*>(v) + token * v_stride;
                for (int64_t head = 0; head < num_kv_heads; ++head)
                    store_head(keys + head * head_dim, values + head * head_dim, c, s,
                               segment_at<KV>(pool, page, layer, head), slot, head_dim,
                               scratch.data());
            }
        }
    });
}
