// RMSNorm (Zhang & Sennrich, 2019), alone and behind the addition of the residual.
#include <cmath>

#include "common.h"

namespace pagewire {
namespace {

template <typename T>
float inverse_rms(const T* x, int64_t dim, float eps) {
    Floats squares = {};
    for_each_vector(dim, [&](int64_t i, auto load, auto) {
        const Floats values = load(x + i);
        squares += values * values;
    });
    return 1.0f / std::sqrt(sum(squares) / dim + eps);
}

// out = weight * x * factor
template <typename T>
void scale_row(const T* x, const T* weight, T* out, int64_t dim, float factor) {
    for_each_vector(dim, [&](int64_t i, auto load, auto store) {
        store(out + i, load(weight + i) * (load(x + i) * factor));
    });
}

// residual += x
template <typename T>
void add_row(const T* x, T* residual, int64_t dim) {
    for_each_vector(dim, [&](int64_t i, auto load, auto store) {
        store(residual + i, load(residual + i) + load(x + i));
    });
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// x: [outer, inner, dim] with strides, the last one 1; weight: [dim]; out: [outer, inner, dim].
PAGEWIRE_EXPORT void rms_norm(int64_t dtype, const void* x, int64_t outer_stride,
                              int64_t inner_stride, const void* weight, void* out, int64_t outer,
                              int64_t inner, int64_t dim, float eps) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const int64_t rows = outer * inner;
#pragma omp parallel for if (rows * dim > kSerialElements)
        for (int64_t row = 0; row < rows; ++row) {
            const T* from = static_cast<const T*>(x) + row / inner * outer_stride +
                            row % inner * inner_stride;
            scale_row(from, static_cast<const T*>(weight), static_cast<T*>(out) + row * dim, dim,
                      inverse_rms(from, dim, eps));
        }
    });
}

// residual += x, out = rms_norm(residual); all [rows, dim].
PAGEWIRE_EXPORT void add_rms_norm(int64_t dtype, const void* x, void* residual, const void* weight,
                                  void* out, int64_t rows, int64_t dim, float eps) {
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
#pragma omp parallel for if (rows * dim > kSerialElements)
        for (int64_t row = 0; row < rows; ++row) {
            T* total = static_cast<T*>(residual) + row * dim;
            add_row(static_cast<const T*>(x) + row * dim, total, dim);
            scale_row(total, static_cast<const T*>(weight), static_cast<T*>(out) + row * dim, dim,
                      inverse_rms(total, dim, eps));
        }
    });
}
