// Attention of a few query rows: decode, where reading K and V once is what takes the time.
// Vectors run along head_dim, so no lane idles however few rows there are.
#pragma once

#include "attention.h"

namespace pagewire {

// Rows that share a read of K and V, as many as fit into the registers with their accumulators.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr int64_t kRowsAtOnce = 2;
#else
constexpr int64_t kRowsAtOnce = 4;
#endif

// More rows than this are faster in the tiles of attention_tile.h.
constexpr int64_t kMaxRows = kLanes / 2;

// The sums of four vectors, written to to[0..3].
inline void store_sums(float* to, Floats a, Floats b, Floats c, Floats d) {
#if defined(__AVX512F__)
    const __m512 ab = _mm512_unpacklo_ps((__m512)a, (__m512)b) + _mm512_unpackhi_ps(a, b);
    const __m512 cd = _mm512_unpacklo_ps((__m512)c, (__m512)d) + _mm512_unpackhi_ps(c, d);
    const __m512 abcd = _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
    const __m256 half = _mm512_castps512_ps256(abcd) + _mm512_extractf32x8_ps(abcd, 1);
    _mm_storeu_ps(to, _mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
    const __m256 abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(to, _mm256_castps256_ps128(abcd) + _mm256_extractf128_ps(abcd, 1));
#else
    vst1q_f32(to, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
#endif
}

// scores[r, n] = q[r] · k[n] for `count` positions, four at a time; q: [Rows, head_dim];
// k: [count, head_dim]; scores: [Rows, kBlock], written up to the next multiple of four.
template <int64_t Rows, typename T>
void score_rows(const float* q, const T* k, int64_t head_dim, int64_t count, float* scores) {
    for (int64_t n = 0; n < count; n += 4) {
        const T* keys[4];  // behind the end the last one again: what lies there may be anything
        UNROLL for (int64_t i = 0; i < 4; ++i)
            keys[i] = k + (n + i < count ? n + i : count - 1) * head_dim;
        Floats sums[Rows][4] = {};
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            Floats key[4];
            UNROLL for (int64_t i = 0; i < 4; ++i) key[i] = load(keys[i] + d);
            UNROLL for (int64_t r = 0; r < Rows; ++r) {
                const Floats query = load(q + r * head_dim + d);
                UNROLL for (int64_t i = 0; i < 4; ++i) sums[r][i] += query * key[i];
            }
        }
        UNROLL for (int64_t r = 0; r < Rows; ++r)
            store_sums(scores + r * kBlock + n, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
    }
}

// Scales lie apart from what was read last, where no hardware prefetcher expects a read.
inline void prefetch(const float* scales, int64_t count) {
    constexpr int64_t cache_line = 64 / sizeof(float);
    for (int64_t n = 0; n < count; n += cache_line) __builtin_prefetch(scales + n);
}

// Multiplies scores by the scales of their keys, or weights by those of their values: as good as
// scaling these, at one multiplication a position instead of head_dim.
inline void scale_row(const float* scales, int64_t count, float* row) {
    for_each_vector(count, [&](int64_t n, auto load, auto store) {
        store(row + n, load(row + n) * load(scales + n));
    });
}

// Turns the scores of one row into weights, padded with zeros to a multiple of kLanes, and updates
// its maximum and sum. Returns the factor that earlier values and sums shrink by.
inline float weigh_row(float* scores, int64_t count, float& max, Floats& sum) {
    const int64_t padded = round_up(count, kLanes);
    for (int64_t n = count; n < padded; ++n) scores[n] = kMinusInfinity;
    Floats largest = broadcast(max);
    for (int64_t n = 0; n < padded; n += kLanes) {
        const Floats score = load(scores + n);
        largest = score > largest ? score : largest;
    }
    const Floats new_max = broadcast(pagewire::max(largest));
    const Floats base = finite_max(new_max);
    const Floats shrink = exp(broadcast(max) - base);
    sum *= shrink;
    for (int64_t n = 0; n < padded; n += kLanes) {
        const Floats weight = exp(load(scores + n) - base);
        store(scores + n, weight);
        sum += weight;
    }
    max = new_max[0];
    return shrink[0];
}

// values[r] = values[r] * shrink[r] + Σ_n weights[r, n] v[n], for Vectors vectors of head_dim.
template <int64_t Rows, int64_t Vectors, typename T>
void add_values(const float* weights, const T* v, int64_t head_dim, int64_t count,
                const float* shrink, float* values) {
    Floats sums[Rows][Vectors];
    UNROLL for (int64_t r = 0; r < Rows; ++r)
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
            sums[r][i] = load(values + r * head_dim + i * kLanes) * shrink[r];
    for (int64_t n = 0; n < count; ++n) {
        UNROLL for (int64_t i = 0; i < Vectors; ++i) {
            const Floats value = load(v + n * head_dim + i * kLanes);
            UNROLL for (int64_t r = 0; r < Rows; ++r) sums[r][i] += weights[r * kBlock + n] * value;
        }
    }
    UNROLL for (int64_t r = 0; r < Rows; ++r)
        UNROLL for (int64_t i = 0; i < Vectors; ++i)
            store(values + r * head_dim + i * kLanes, sums[r][i]);
}

template <int64_t Rows, typename T>
void add_values(const float* weights, const T* v, int64_t head_dim, int64_t count,
                const float* shrink, float* values) {
    int64_t d = 0;
    for (; d + 4 * kLanes <= head_dim; d += 4 * kLanes)
        add_values<Rows, 4>(weights, v + d, head_dim, count, shrink, values + d);
    for (; d < head_dim; d += kLanes)
        add_values<Rows, 1>(weights, v + d, head_dim, count, shrink, values + d);
}

// Hides the positions begin .. begin + count that row r does not see.
template <typename T>
void mask_row(const Queries<T>& queries, int64_t r, int64_t begin, int64_t count, float* scores) {
    const int64_t position = queries.position_of(r);
    for (int64_t n = 0; n < count && begin + n <= position - queries.window; ++n)
        scores[n] = kMinusInfinity;
    for (int64_t n = count; n > 0 && begin + n - 1 > position; --n) scores[n - 1] = kMinusInfinity;
}

inline int64_t rows_scratch_size(int64_t head_dim) { return kMaxRows * (head_dim + kBlock); }

// Attends over positions begin .. end. Needs head_dim to be a multiple of kLanes and at most
// kMaxRows rows; scratch: rows_scratch_size() floats.
template <typename T, typename KV>
void attend_rows(const Queries<T>& queries, const PagedKV<KV>& kv, int64_t begin, int64_t end,
                 float* scratch, SoftmaxState state) {
    const int64_t num_rows = queries.num_rows(), head_dim = queries.head_dim;
    float* q = scratch;                   // [num_rows, head_dim], scaled
    float* scores = q + kMaxRows * head_dim;  // [num_rows, kBlock]
    Floats sums[kMaxRows] = {};
    float shrink[kMaxRows];
    for (int64_t r = 0; r < num_rows; ++r) {
        const T* row = queries.row(r);
        for (int64_t d = 0; d < head_dim; d += kLanes) {
            store(q + r * head_dim + d, load(row + d) * queries.scale);
            store(state.values + r * head_dim + d, Floats{});
        }
        state.max[r] = kMinusInfinity;
    }
    for_each_block(begin, end, kv.block(), [&](int64_t first, int64_t stop) {
        const int64_t count = stop - first;
        const auto segment = kv.at(first);
        if constexpr (is_quantized<KV>) {
            prefetch(segment.key_scales, count);
            prefetch(segment.value_scales, count);
        }
        for (int64_t r = 0; r < num_rows; r += kRowsAtOnce)
            with_constant<kRowsAtOnce>(num_rows - r, [&](auto rows) {
                score_rows<rows>(q + r * head_dim, segment.keys, head_dim, count,
                                 scores + r * kBlock);
            });
        for (int64_t r = 0; r < num_rows; ++r) {
            float* row = scores + r * kBlock;
            if constexpr (is_quantized<KV>) scale_row(segment.key_scales, count, row);
            mask_row(queries, r, first, count, row);
            shrink[r] = weigh_row(row, count, state.max[r], sums[r]);
            if constexpr (is_quantized<KV>) scale_row(segment.value_scales, count, row);
        }
        for (int64_t r = 0; r < num_rows; r += kRowsAtOnce)
            with_constant<kRowsAtOnce>(num_rows - r, [&](auto rows) {
                add_values<rows>(scores + r * kBlock, segment.values, head_dim, count, shrink + r,
                                 state.values + r * head_dim);
            });
    });
    for (int64_t r = 0; r < num_rows; ++r) state.sum[r] = sum(sums[r]);
}

}  // namespace pagewire
