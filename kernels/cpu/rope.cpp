// Rotary position embedding (Su et al., 2021) of queries and keys, and keys and values into pages.
#include "common.h"

namespace pagewire {
namespace {

// Turns the two halves of a head against each other; to: [2 * half].
template <typename T>
void rotate_head(const T* x, const float* cosine, const float* sine, T* to, int64_t half) {
    for_each_vector(half, [&](int64_t i, auto load, auto store) {
        const Floats first = load(x + i), second = load(x + half + i);
        const Floats c = load(cosine + i), s = load(sine + i);
        store(to + i, first * c - second * s);
        store(to + half + i, second * c + first * s);
    });
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// q: [num_tokens, num_heads, head_dim], k and v: [num_tokens, num_kv_heads, head_dim], each with a
// stride between its tokens, so that all three may be parts of one tensor; cosine, sine: [num_tokens,
// head_dim / 2]; pool: [num_pages, num_layers, num_kv_heads, 2, page_size, head_dim]; slots:
// [num_tokens], page * page_size + offset; out: [num_tokens, num_heads, head_dim].
PAGEWIRE_EXPORT void rope_and_store(int64_t dtype, const void* q, int64_t q_stride, const void* k,
                                    int64_t k_stride, const void* v, int64_t v_stride,
                                    const float* cosine, const float* sine, void* pool,
                                    const int64_t* slots, void* out, int64_t num_tokens,
                                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                    int64_t num_layers, int64_t layer, int64_t page_size) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t half = head_dim / 2, segment = page_size * head_dim;
#pragma omp parallel for if (num_tokens * (num_heads + 2 * num_kv_heads) * head_dim > \
                                 kSerialElements)
        for (int64_t token = 0; token < num_tokens; ++token) {
            const float* c = cosine + token * half;
            const float* s = sine + token * half;
            const T* from = static_cast<const T*>(q) + token * q_stride;
            T* rotated = static_cast<T*>(out) + token * num_heads * head_dim;
            for (int64_t head = 0; head < num_heads; ++head)
                rotate_head(from + head * head_dim, c, s, rotated + head * head_dim, half);

            const int64_t page = slots[token] / page_size, offset = slots[token] % page_size;
            T* keys = static_cast<T*>(pool) +
                      (page * num_layers + layer) * num_kv_heads * 2 * segment + offset * head_dim;
            for (int64_t head = 0; head < num_kv_heads; ++head, keys += 2 * segment) {
                const int64_t start = head * head_dim;
                rotate_head(static_cast<const T*>(k) + token * k_stride + start, c, s, keys, half);
                std::memcpy(keys + segment, static_cast<const T*>(v) + token * v_stride + start,
                            head_dim * sizeof(T));
            }
        }
    });
}
