// Attention of many query rows: prefill, as two matrix products with softmax between them
// (FlashAttention, Dao et al., 2022). Vectors run along the query rows: K and V are read as they
// lie in their pages, one element for all rows at a time, and softmax needs no sum across lanes.
#pragma once

#include "attention.h"

namespace pagewire {

// A panel is the query rows of one to three vectors. What belongs to it is stored transposed,
// [head_dim, width]; panels lie behind one another.
constexpr int64_t kPanelVectors = 3;

// Positions or dimensions that a micro-kernel computes at once: enough accumulators to hide the
// latency of multiply-add, few enough for the registers.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kUnroll = 4;
#else
constexpr int64_t kUnroll = 8;
#endif

// scores[n] = Σ_d k[n, d] q[d] for Count positions; q: [head_dim, width]; scores: [Count, width].
template <int64_t Vectors, int64_t Count>
void score_tile(const float* q, const float* k, int64_t head_dim, float* scores) {
    constexpr int64_t width = Vectors * kLanes;
    Floats sums[Count][Vectors] = {};
    for (int64_t d = 0; d < head_dim; ++d) {
        Floats query[Vectors];
        UNROLL for (int64_t i = 0; i < Vectors; ++i) query[i] = load(q + d * width + i * kLanes);
        UNROLL for (int64_t n = 0; n < Count; ++n)
            UNROLL for (int64_t i = 0; i < Vectors; ++i)
            sums[n][i] += k[n * head_dim + d] * query[i];
    }
    UNROLL for (int64_t n = 0; n < Count; ++n)
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
        store(scores + n * width + i * kLanes, sums[n][i]);
}

template <int64_t Vectors>
void score_panel(const float* q, const float* k, int64_t head_dim, int64_t count, float* scores) {
    constexpr int64_t width = Vectors * kLanes;
    int64_t n = 0;
    for (; n + kUnroll <= count; n += kUnroll)
        score_tile<Vectors, kUnroll>(q, k + n * head_dim, head_dim, scores + n * width);
    for (; n < count; ++n)
        score_tile<Vectors, 1>(q, k + n * head_dim, head_dim, scores + n * width);
}

// values[d] = values[d] * shrink + Σ_n v[n, d] weights[n] for Count dimensions.
template <int64_t Vectors, int64_t Count>
void add_tile(const float* weights, const float* v, int64_t head_dim, int64_t count,
              const Floats* shrink, float* values) {
    constexpr int64_t width = Vectors * kLanes;
    Floats sums[Count][Vectors];
    UNROLL for (int64_t d = 0; d < Count; ++d)
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
            sums[d][i] = load(values + d * width + i * kLanes) * shrink[i];
    for (int64_t n = 0; n < count; ++n) {
        Floats weight[Vectors];
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
            weight[i] = load(weights + n * width + i * kLanes);
        UNROLL for (int64_t d = 0; d < Count; ++d)
            UNROLL for (int64_t i = 0; i < Vectors; ++i)
            sums[d][i] += v[n * head_dim + d] * weight[i];
    }
    UNROLL for (int64_t d = 0; d < Count; ++d)
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
        store(values + d * width + i * kLanes, sums[d][i]);
}

template <int64_t Vectors>
void add_panel(const float* weights, const float* v, int64_t head_dim, int64_t count,
               const Floats* shrink, float* values) {
    constexpr int64_t width = Vectors * kLanes;
    int64_t d = 0;
    for (; d + kUnroll <= head_dim; d += kUnroll)
        add_tile<Vectors, kUnroll>(weights, v + d, head_dim, count, shrink, values + d * width);
    for (; d < head_dim; ++d)
        add_tile<Vectors, 1>(weights, v + d, head_dim, count, shrink, values + d * width);
}

// The state of a panel beside its transposed values, one lane a query row.
struct PanelRows {
    Ints position;
    Floats max;
    Floats sum;
};

// Hides the positions begin .. begin + count that a lane does not see; scores: [count, width].
inline void mask_lanes(const PanelRows& rows, int64_t window, int64_t begin, int64_t count,
                       int64_t width, float* scores) {
    const Ints last = rows.position - static_cast<int32_t>(begin);
    const Ints first = last - static_cast<int32_t>(window) + 1;
    for (int64_t n = 0; n < count; ++n) {
        const Ints at = Ints{} + static_cast<int32_t>(n);
        const Floats score = load(scores + n * width);
        const Floats below = at > last ? broadcast(kMinusInfinity) : score;
        store(scores + n * width, at < first ? broadcast(kMinusInfinity) : below);
    }
}

// Turns scores into weights and updates maximum and sum. Returns what earlier values shrink by.
inline Floats weigh_lanes(PanelRows& rows, int64_t count, int64_t width, float* scores) {
    Floats max = rows.max;
    for (int64_t n = 0; n < count; ++n) {
        const Floats score = load(scores + n * width);
        max = score > max ? score : max;
    }
    const Floats base = finite_max(max);
    const Floats shrink = exp(rows.max - base);
    Floats sum = rows.sum * shrink;
    for (int64_t n = 0; n < count; ++n) {
        const Floats weight = exp(load(scores + n * width) - base);
        store(scores + n * width, weight);
        sum += weight;
    }
    rows.max = max;
    rows.sum = sum;
    return shrink;
}

// One block of positions for one panel. k, v: [count, head_dim]; scores: [kBlock, width].
template <int64_t Vectors>
void attend_panel(const float* q, const float* k, const float* v, int64_t head_dim, int64_t begin,
                  int64_t count, int64_t window, bool masked, float* scores, PanelRows* rows,
                  float* values) {
    constexpr int64_t width = Vectors * kLanes;
    score_panel<Vectors>(q, k, head_dim, count, scores);
    Floats shrink[Vectors];
    for (int64_t i = 0; i < Vectors; ++i) {
        if (masked) mask_lanes(rows[i], window, begin, count, width, scores + i * kLanes);
        shrink[i] = weigh_lanes(rows[i], count, width, scores + i * kLanes);
    }
    add_panel<Vectors>(scores, v, head_dim, count, shrink, values);
}

// `count` elements as floats: where they lie, or converted into `scratch`.
inline const float* as_floats(const float* from, int64_t, float*) { return from; }

template <typename T>
const float* as_floats(const T* from, int64_t count, float* scratch) {
    for_each_vector(count,
                    [&](int64_t i, auto load, auto store) { store(scratch + i, load(from + i)); });
    return scratch;
}

// K or V of `count` positions as floats. A tile converts them once for all its rows, so scales are
// best multiplied in here.
template <typename KV>
const float* as_floats(const KV* from, const float* scales, int64_t count, int64_t head_dim,
                       float* scratch) {
    if constexpr (!is_quantized<KV>) {
        return as_floats(from, count * head_dim, scratch);
    } else {
        for (int64_t n = 0; n < count; ++n) {
            const Floats scale = broadcast(scales[n]);
            for_each_vector(head_dim, [&](int64_t d, auto load, auto store) {
                store(scratch + n * head_dim + d, load(from + n * head_dim + d) * scale);
            });
        }
        return scratch;
    }
}

// Calls body(vectors, first lane) for each panel of `lanes` query rows, a multiple of kLanes.
template <typename Body>
void for_each_panel(int64_t lanes, Body body) {
    for (int64_t lane = 0; lane < lanes; lane += kPanelVectors * kLanes)
        with_constant<kPanelVectors>((lanes - lane) / kLanes,
                                     [&](auto vectors) { body(vectors, lane); });
}

inline int64_t tile_scratch_size(int64_t num_rows, int64_t head_dim) {
    const int64_t lanes = round_up(num_rows, kLanes);
    return lanes * (2 * head_dim + 3) + kBlock * (kPanelVectors * kLanes + 2 * head_dim);
}

// Attends over positions begin .. end; scratch: tile_scratch_size() floats.
template <typename T, typename KV>
void attend_tile(const Queries<T>& queries, const PagedKV<KV>& kv, int64_t begin, int64_t end,
                 float* scratch, SoftmaxState state) {
    const int64_t num_rows = queries.num_rows(), head_dim = queries.head_dim;
    const int64_t lanes = round_up(num_rows, kLanes);
    PanelRows* rows = reinterpret_cast<PanelRows*>(scratch);
    float* q = scratch + 3 * lanes;
    float* values = q + lanes * head_dim;
    float* scores = values + lanes * head_dim;
    float* key_scratch = scores + kBlock * kPanelVectors * kLanes;
    float* value_scratch = key_scratch + kBlock * head_dim;

    std::memset(values, 0, lanes * head_dim * sizeof(float));
    for_each_panel(lanes, [&](auto vectors, int64_t lane) {
        constexpr int64_t width = vectors * kLanes;
        for (int64_t i = 0; i < width; ++i) {
            // Lanes behind the last row compute it again; their result is not read.
            const int64_t r = lane + i < num_rows ? lane + i : num_rows - 1;
            PanelRows& panel = rows[(lane + i) / kLanes];
            panel.position[i % kLanes] = static_cast<int32_t>(queries.position_of(r));
            const float* row = as_floats(queries.row(r), head_dim, scores);
            for (int64_t d = 0; d < head_dim; ++d)
                q[lane * head_dim + d * width + i] = row[d] * queries.scale;
        }
    });
    for (int64_t i = 0; i < lanes / kLanes; ++i) {
        rows[i].max = broadcast(kMinusInfinity);
        rows[i].sum = Floats{};
    }
    const int64_t last = queries.position_of(num_rows - 1);
    for_each_block(begin, end, kv.block(), [&](int64_t first, int64_t stop) {
        const int64_t count = stop - first;
        const auto segment = kv.at(first);
        const float* k =
            as_floats(segment.keys, segment.key_scales, count, head_dim, key_scratch);
        const float* v =
            as_floats(segment.values, segment.value_scales, count, head_dim, value_scratch);
        const bool masked = stop - 1 > queries.position || first <= last - queries.window;
        for_each_panel(lanes, [&](auto vectors, int64_t lane) {
            attend_panel<vectors>(q + lane * head_dim, k, v, head_dim, first, count, queries.window,
                                  masked, scores, rows + lane / kLanes, values + lane * head_dim);
        });
    });
    for_each_panel(lanes, [&](auto vectors, int64_t lane) {
        constexpr int64_t width = vectors * kLanes;
        for (int64_t i = 0; i < width && lane + i < num_rows; ++i) {
            const int64_t r = lane + i;
            for (int64_t d = 0; d < head_dim; ++d)
                state.values[r * head_dim + d] = values[lane * head_dim + d * width + i];
            state.max[r] = rows[r / kLanes].max[r % kLanes];
            state.sum[r] = rows[r / kLanes].sum[r % kLanes];
        }
    });
}

}  // namespace pagewire
