// What the attention kernels share: the queries and the paged KV that one work item sees, and the
// state of its softmax.
#pragma once

#include <limits>

#include "kv_pool.h"
#include "unroll.h"

namespace pagewire {

// Positions of the context between two updates of the running softmax. Blocks start at multiples of
// it, whatever range an item covers: sums of a token then do not depend on how its prompt is cut.
constexpr int64_t kBlock = 64;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// The query heads of one KV head, of consecutive tokens of one row: row r of an item is head
// r % group of token r / group.
template <typename T>
struct Queries {
    const T* q;  // the first row
    int64_t token_stride;
    int64_t num_tokens;
    int64_t group;
    int64_t head_dim;
    float scale;
    int64_t position;  // of the first token
    int64_t window;    // a token sees itself and the window - 1 positions before it

    int64_t num_rows() const { return num_tokens * group; }
    const T* row(int64_t r) const { return q + r / group * token_stride + r % group * head_dim; }
    int64_t position_of(int64_t r) const { return position + r / group; }
};

// K and V of one row, layer and KV head, by position.
template <typename KV>
struct PagedKV {
    const KVPool& pool;
    const int32_t* pages;  // of the row
    int64_t layer;
    int64_t kv_head;

    // From `position` on, as far as its page goes.
    KVSegment<const KV> at(int64_t position) const {
        const KVSegment<KV> segment =
            segment_at<KV>(pool, pages[position / pool.page_size], layer, kv_head);
        const int64_t slot = position % pool.page_size, start = slot * pool.head_dim;
        const KV *keys = segment.keys + start, *values = segment.values + start;
        if constexpr (!is_quantized<KV>) return {keys, values, nullptr, nullptr};
        return {keys, values, segment.key_scales + slot, segment.value_scales + slot};
    }
    int64_t block() const { return pool.page_size < kBlock ? pool.page_size : kBlock; }
};

// Softmax over a part of the context (Milakov & Gimelshein, 2018): the maximum of the scores, the
// sum of their exponentials and the values weighted by these, relative to the maximum.
struct SoftmaxState {
    float* values;  // [num_rows, head_dim]
    float* max;     // [num_rows]
    float* sum;     // [num_rows]
};

constexpr int64_t state_size(int64_t num_rows, int64_t head_dim) {
    return num_rows * (head_dim + 2);
}

inline SoftmaxState state_at(float* memory, int64_t num_rows, int64_t head_dim) {
    float* max = memory + num_rows * head_dim;
    return {memory, max, max + num_rows};
}

inline int64_t round_up(int64_t value, int64_t multiple) {
    return (value + multiple - 1) / multiple * multiple;
}

// Calls body(begin, end) for the parts of begin..end between multiples of `block`.
template <typename Body>
void for_each_block(int64_t begin, int64_t end, int64_t block, Body body) {
    while (begin < end) {
        const int64_t next = (begin / block + 1) * block;
        const int64_t stop = next < end ? next : end;
        body(begin, stop);
        begin = stop;
    }
}

// What scores are taken relative to: the maximum, or 0 where nothing was visible yet.
inline Floats finite_max(Floats max) { return max == kMinusInfinity ? Floats{} : max; }

}  // namespace pagewire
