// RMSNorm (Zhang & Sennrich, 2019), alone and behind the addition of the residual.
#include <cmath>

#include "functions.h"
#include "rows.h"

namespace pagewire {
namespace {

// to = weight * x / rms(x)
template <typename T>
void norm_row(const T* x, const T* weight, T* to, int64_t dim, float eps) {
    Floats squares = {};
    for_each_vector(dim, [&](int64_t i, auto load, auto) {
        const Floats values = load(x + i);
        squares += values * values;
    });
    const float factor = 1.0f / std::sqrt(sum(squares) / dim + eps);
    for_each_vector(dim, [&](int64_t i, auto load, auto store) {
        store(to + i, load(weight + i) * (load(x + i) * factor));
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

// x: [outer, inner, dim] with strides, the last one 1; weight: [dim]; one row of output for each
// of its outer * inner.
PAGEWIRE_EXPORT void rms_norm(int64_t dtype, const void* x, int64_t outer_stride,
                              int64_t inner_stride, const void* weight, void* out, void* groups,
                              int64_t outer, int64_t inner, int64_t dim, float eps) {
    const Output output{out, static_cast<ActivationGroup*>(groups)};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_each_row<T>(outer * inner, dim, output, [&](int64_t row, T* to) {
            const T* from = static_cast<const T*>(x) + row / inner * outer_stride +
                            row % inner * inner_stride;
            norm_row(from, static_cast<const T*>(weight), to, dim, eps);
        });
    });
}

// residual += x, output = rms_norm(residual); x, residual: [rows, dim].
PAGEWIRE_EXPORT void add_rms_norm(int64_t dtype, const void* x, void* residual, const void* weight,
                                  void* out, void* groups, int64_t rows, int64_t dim,
                                  float eps) {
    const Output output{out, static_cast<ActivationGroup*>(groups)};
    dispatch(dtype, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        for_each_row<T>(rows, dim, output, [&](int64_t row, T* to) {
            T* total = static_cast<T*>(residual) + row * dim;
            add_row(static_cast<const T*>(x) + row * dim, total, dim);
            norm_row(total, static_cast<const T*>(weight), to, dim, eps);
        });
    });
}
