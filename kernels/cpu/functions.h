// The functions that a decoder's step calls in every layer, as replay.cpp calls them too. Each is
// explained where it is defined.
#pragma once

#include <cstdint>

#include "common.h"

PAGEWIRE_EXPORT void quantize(int64_t dtype, const void* x, void* groups, int64_t rows,
                              int64_t dim);
PAGEWIRE_EXPORT void rms_norm(int64_t dtype, const void* x, int64_t outer_stride,
                              int64_t inner_stride, const void* weight, void* out, void* groups,
                              int64_t outer, int64_t inner, int64_t dim, float eps);
PAGEWIRE_EXPORT void add_rms_norm(int64_t dtype, const void* x, void* residual, const void* weight,
                                  void* out, void* groups, int64_t rows, int64_t dim, float eps);
PAGEWIRE_EXPORT void silu_mul(int64_t dtype, const void* gate_up, void* out, void* groups,
                              int64_t rows, int64_t dim);
PAGEWIRE_EXPORT void rope_and_store(int64_t dtype, const void* q, int64_t q_stride, const void* k,
                                    int64_t k_stride, const void* v, int64_t v_stride,
                                    const float* cosine, const float* sine, void* data,
                                    const int64_t* slots, void* out, int64_t num_tokens,
                                    int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                                    int64_t num_layers, int64_t layer, int64_t page_size,
                                    int64_t segment_bytes, int64_t quantized);
PAGEWIRE_EXPORT void paged_attention(const void* prepared, const void* q, int64_t token_stride,
                                     void* data, int64_t layer, void* out);
PAGEWIRE_EXPORT void linear_float(int64_t dtype, int64_t out_dtype, const void* x,
                                  const void* weight, const void* bias, void* out, int64_t rows,
                                  int64_t in_features, int64_t out_features);
PAGEWIRE_EXPORT void linear_int8(int64_t dtype, const void* x, const void* weights,
                                 const void* bias, void* out, int64_t rows, int64_t num_groups,
                                 int64_t out_features);
PAGEWIRE_EXPORT void linear_int4(int64_t dtype, const void* x, const void* weights,
                                 const void* bias, void* out, int64_t rows, int64_t num_groups,
                                 int64_t out_features);
