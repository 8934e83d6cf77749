// Paged attention of one step: the work items of native_attention.py over threads, then the items
// whose context was split put together again.
#include <omp.h>

#include <algorithm>

#include "attention_rows.h"
#include "attention_tile.h"
#include "functions.h"

namespace pagewire {
namespace {

// Consecutive tokens of one row against a range of its context; for every KV head. _Item in
// native_attention.py.
struct Item {
    int64_t row;
    int64_t token;  // the first, in the ragged dimension
    int64_t num_tokens;
    int64_t position;  // of the first token
    int64_t begin;     // of the range of positions
    int64_t end;
    int64_t part;  // where the state goes when others share the tokens; -1: nobody does
};

// Items that share their tokens. _Merge in native_attention.py.
struct Merge {
    int64_t token;
    int64_t num_tokens;
    int64_t first_part;
    int64_t num_parts;
};

// AttentionStep in native_attention.py.
struct Step {
    int64_t dtype;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_dim;
    int64_t page_size;
    int64_t num_layers;
    int64_t segment_bytes;
    int64_t quantized;  // whether the pool's values have 8 bits; else they are of `dtype`
    const int32_t* page_table;
    int64_t max_pages;
    const Item* items;
    int64_t num_items;
    const Merge* merges;
    int64_t num_merges;
    int64_t max_rows;  // query rows of the largest item
    int64_t window;
    float scale;
    float* parts;    // [num_parts, num_kv_heads, part_size]
    float* scratch;  // [num_threads, thread_size]
    int64_t num_threads;  // at most
    int64_t part_size;
    int64_t thread_size;
    int64_t tiles_only;  // sums of few query rows have the order of those of many

    int64_t group() const { return num_heads / num_kv_heads; }
};

// Adds the softmax over another part of the context to `state`.
void add_state(int64_t num_rows, int64_t head_dim, SoftmaxState state, SoftmaxState other) {
    for (int64_t r = 0; r < num_rows; ++r) {
        const float max = std::max(state.max[r], other.max[r]);
        const Floats base = finite_max(broadcast(max));
        const Floats factor = exp(state.max[r] - base), other_factor = exp(other.max[r] - base);
        state.max[r] = max;
        state.sum[r] = state.sum[r] * factor[0] + other.sum[r] * other_factor[0];
        for_each_vector(head_dim, [&](int64_t d, auto load, auto store) {
            float* values = state.values + r * head_dim + d;
            const float* others = other.values + r * head_dim + d;
            store(values, load(values) * factor + load(others) * other_factor);
        });
    }
}

// out: the first row of [num_tokens, num_heads, head_dim].
template <typename T>
void write_output(const Step& step, int64_t num_rows, SoftmaxState state, T* out) {
    const int64_t group = step.group(), head_dim = step.head_dim;
    for (int64_t r = 0; r < num_rows; ++r) {
        T* to = out + (r / group * step.num_heads + r % group) * head_dim;
        const float factor = 1.0f / state.sum[r];
        for_each_vector(head_dim, [&](int64_t d, auto load, auto store) {
            store(to + d, load(state.values + r * head_dim + d) * factor);
        });
    }
}

template <typename KV, typename T>
void run_item(const Step& step, const Item& item, int64_t kv_head, int64_t layer, const T* q,
              int64_t token_stride, const KVPool& pool, T* out, float* scratch) {
    const int64_t group = step.group(), head_dim = step.head_dim;
    const Queries<T> queries = {
        q + item.token * token_stride + kv_head * group * head_dim,
        token_stride,
        item.num_tokens,
        group,
        head_dim,
        step.scale,
        item.position,
        step.window,
    };
    const PagedKV<KV> kv = {pool, step.page_table + item.row * step.max_pages, layer, kv_head};
    const int64_t size = step.part_size;
    float* memory = item.part < 0
                        ? scratch
                        : step.parts + (item.part * step.num_kv_heads + kv_head) * size;
    const SoftmaxState state = state_at(memory, queries.num_rows(), head_dim);
    if (!step.tiles_only && queries.num_rows() <= kMaxRows && head_dim % kLanes == 0)
        attend_rows(queries, kv, item.begin, item.end, scratch + size, state);
    else
        attend_tile(queries, kv, item.begin, item.end, scratch + size, state);
    if (item.part < 0)
        write_output(step, queries.num_rows(), state,
                     out + (item.token * step.num_heads + kv_head * group) * head_dim);
}

template <typename T>
void run_merge(const Step& step, const Merge& merge, int64_t kv_head, T* out) {
    const int64_t num_rows = merge.num_tokens * step.group();
    const auto part = [&](int64_t index) {
        const int64_t place = (merge.first_part + index) * step.num_kv_heads + kv_head;
        return state_at(step.parts + place * step.part_size, num_rows, step.head_dim);
    };
    for (int64_t index = 1; index < merge.num_parts; ++index)
        add_state(num_rows, step.head_dim, part(0), part(index));
    write_output(
        step, num_rows, part(0),
        out + (merge.token * step.num_heads + kv_head * step.group()) * step.head_dim);
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// Fills in part_size and thread_size: the floats that a step needs for each part and KV head, and
// for each thread. Both are whole vectors, so that every part and thread starts at one.
PAGEWIRE_EXPORT void attention_sizes(Step* step) {
    step->part_size = round_up(state_size(step->max_rows, step->head_dim), kLanes);
    // A state that is no part lies in front of what the kernels need.
    step->thread_size =
        step->part_size +
        round_up(std::max(rows_scratch_size(step->head_dim),
                          tile_scratch_size(step->max_rows, step->head_dim)),
                 kLanes);
}

// prepared: a Step; q: [num_tokens, num_heads, head_dim] with tokens token_stride apart; data: a KVPool, not written;
// out: as q, contiguous.
PAGEWIRE_EXPORT void paged_attention(const void* prepared, const void* q, int64_t token_stride,
                                     void* data, int64_t layer, void* out) {
    const Step* step = static_cast<const Step*>(prepared);
    const KVPool pool = {static_cast<char*>(data), step->num_layers, step->num_kv_heads,
                         step->page_size,          step->head_dim,   step->segment_bytes};
    dispatch_pool(step->dtype, step->quantized, [&](auto* type, auto* kv_type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using KV = std::remove_pointer_t<decltype(kv_type)>;
        const int64_t kv_heads = step->num_kv_heads;
        const int num_threads =
            std::min(static_cast<int>(step->num_threads), omp_get_max_threads());
#pragma omp parallel num_threads(num_threads) if (num_threads > 1)
        {
            float* scratch = step->scratch + omp_get_thread_num() * step->thread_size;
            // Items are sorted by their cost: whoever is free takes the largest that is left.
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < step->num_items * kv_heads; ++i)
                run_item<KV>(*step, step->items[i / kv_heads], i % kv_heads, layer,
                             static_cast<const T*>(q), token_stride, pool, static_cast<T*>(out),
                             scratch);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < step->num_merges * kv_heads; ++i)
                run_merge(*step, step->merges[i / kv_heads], i % kv_heads, static_cast<T*>(out));
        }
    });
}
