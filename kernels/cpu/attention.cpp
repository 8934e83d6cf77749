// Paged attention of one step: the work items of native_attention.py over threads, then the items
// whose context was split put together again.
#include <omp.h>

#include "attention_rows.h"
#include "attention_tile.h"

namespace pagewire {
namespace {

// Consecutive tokens of one row against a range of its context; for every KV head. ITEM_FIELDS.
struct Item {
    int64_t row;
    int64_t token;  // the first, in the ragged dimension
    int64_t num_tokens;
    int64_t position;  // of the first token
    int64_t begin;     // of the range of positions
    int64_t end;
    int64_t part;  // where the state goes when others share the tokens; -1: nobody does
};

// Items that share their tokens. MERGE_FIELDS.
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
    int64_t num_threads;

    int64_t group() const { return num_heads / num_kv_heads; }
};

// Parts and threads start at multiples of a vector.
int64_t part_size(const Step& step) {
    return round_up(state_size(step.max_rows, step.head_dim), kLanes);
}

// A state that no part holds lies in front of the scratch of the kernel.
int64_t thread_size(const Step& step) {
    const int64_t kernel = rows_scratch_size(step.head_dim) +
                           tile_scratch_size(step.max_rows, step.head_dim);
    return part_size(step) + round_up(kernel, kLanes);
}

// Writes the softmax over all parts of `num_tokens` tokens; `parts` are `stride` floats apart.
template <typename T>
void write_output(const Step& step, int64_t num_tokens, const float* parts, int64_t num_parts,
                  int64_t stride, T* out) {
    const int64_t num_rows = num_tokens * step.group(), head_dim = step.head_dim;
    for (int64_t r = 0; r < num_rows; ++r) {
        const float* max = parts + num_rows * head_dim + r;
        const float* sum = max + num_rows;
        float largest = kMinusInfinity;
        for (int64_t i = 0; i < num_parts; ++i)
            largest = max[i * stride] > largest ? max[i * stride] : largest;
        float total = 0.0f;
        for (int64_t i = 0; i < num_parts; ++i)
            total += exp(broadcast(max[i * stride] - largest))[0] * sum[i * stride];
        T* to = out + (r / step.group() * step.num_heads + r % step.group()) * head_dim;
        for_each_vector(head_dim, [&](int64_t d, auto load, auto store) {
            Floats values = {};
            for (int64_t i = 0; i < num_parts; ++i)
                values += load(parts + i * stride + r * head_dim + d) *
                          exp(broadcast(max[i * stride] - largest));
            store(to + d, values / total);
        });
    }
}

template <typename T>
void run_item(const Step& step, const Item& item, int64_t kv_head, int64_t layer, const T* q,
              int64_t token_stride, const T* pool, T* out, float* scratch) {
    const int64_t group = step.group(), head_dim = step.head_dim;
    const int64_t kv_size = 2 * step.page_size * head_dim;
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
    const PagedKV<T> kv = {
        pool + (layer * step.num_kv_heads + kv_head) * kv_size,
        step.page_table + item.row * step.max_pages,
        step.num_layers * step.num_kv_heads * kv_size,
        step.page_size,
        head_dim,
    };
    const int64_t size = part_size(step);
    float* memory = item.part < 0
                        ? scratch
                        : step.parts + (item.part * step.num_kv_heads + kv_head) * size;
    const SoftmaxState state = state_at(memory, queries.num_rows(), head_dim);
    if (queries.num_rows() <= kMaxRows && head_dim % kLanes == 0)
        attend_rows(queries, kv, item.begin, item.end, scratch + size, state);
    else
        attend_tile(queries, kv, item.begin, item.end, scratch + size, state);
    if (item.part < 0)
        write_output(step, item.num_tokens, memory, 1, size,
                     out + (item.token * step.num_heads + kv_head * group) * head_dim);
}

template <typename T>
void run_merge(const Step& step, const Merge& merge, int64_t kv_head, T* out) {
    const int64_t size = part_size(step);
    write_output(
        step, merge.num_tokens,
        step.parts + (merge.first_part * step.num_kv_heads + kv_head) * size, merge.num_parts,
        step.num_kv_heads * size,
        out + (merge.token * step.num_heads + kv_head * step.group()) * step.head_dim);
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// How many floats a step needs: of each part and KV head, and of each thread.
PAGEWIRE_EXPORT int64_t attention_part_size(const Step* step) { return part_size(*step); }
PAGEWIRE_EXPORT int64_t attention_thread_size(const Step* step) { return thread_size(*step); }

// q: [num_tokens, num_heads, head_dim] with tokens token_stride apart; pool: [num_pages, num_layers,
// num_kv_heads, 2, page_size, head_dim]; out: as q, contiguous.
PAGEWIRE_EXPORT void paged_attention(const Step* step, const void* q, int64_t token_stride,
                                     const void* pool, int64_t layer, void* out) {
    dispatch(step->dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t kv_heads = step->num_kv_heads;
#pragma omp parallel num_threads(step->num_threads) if (step->num_threads > 1)
        {
            float* scratch = step->scratch + omp_get_thread_num() * thread_size(*step);
            // Items are sorted by their cost: whoever is free takes the largest that is left.
#pragma omp for schedule(dynamic, 1)
            for (int64_t i = 0; i < step->num_items * kv_heads; ++i)
                run_item(*step, step->items[i / kv_heads], i % kv_heads, layer,
                         static_cast<const T*>(q), token_stride, static_cast<const T*>(pool),
                         static_cast<T*>(out), scratch);
#pragma omp for schedule(static)
            for (int64_t i = 0; i < step->num_merges * kv_heads; ++i)
                run_merge(*step, step->merges[i / kv_heads], i % kv_heads, static_cast<T*>(out));
        }
    });
}
