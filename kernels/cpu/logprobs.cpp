// Log probabilities of single tokens and of the most likely ones.
#include "vocabulary.h"

namespace pagewire {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Sorts the indices of the `count` largest of the row's values to the front of `ids`, equal ones by
// index.
void find_largest(const float* row, int64_t size, int64_t count, Scratch& scratch) {
    int32_t* ids = scratch.ids.get();
    const int64_t rank = std::min(count, num_groups(size));
    int64_t listed =
        copy_largest(row, size, scratch.maxima.get(), rank, scratch.listed.get(), ids);
    if (listed < count)  // a short row, or one whose most values are in few groups
        listed = copy_at_least(row, size, -kInfinity, scratch.listed.get(), ids);
    std::partial_sort(ids, ids + std::min(count, listed), ids + listed, [&](int32_t a, int32_t b) {
        return row[a] > row[b] || (row[a] == row[b] && a < b);
    });
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// logits: [.., size]; rows, tokens: [count]; sampled: [count], of the token in each of these rows;
// top_ids, top: [count, num_top], the most likely first. num_top <= size. All are NaN in a row
// whose largest logit is not finite, or that has a NaN.
PAGEWIRE_EXPORT void logprobs(const float* logits, const int64_t* rows, const int64_t* tokens,
                              double* sampled, int64_t* top_ids, double* top, int64_t count,
                              int64_t size, int64_t num_top) {
#pragma omp parallel if (count > 1 && count * size > kSerialElements)
    {
        Scratch scratch(size);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < count; ++i) {
            const float* row = logits + rows[i] * size;
            const float highest = group_maxima(row, size, scratch.maxima.get());
            if (!std::isfinite(highest)) {
                sampled[i] = kNaN;
                std::fill_n(top_ids + i * num_top, num_top, 0);
                std::fill_n(top + i * num_top, num_top, kNaN);
                continue;
            }
            const double normalizer = highest + std::log(sum_of_weights(row, size, highest, 1.0f));
            sampled[i] = row[tokens[i]] - normalizer;
            if (num_top > 0) find_largest(row, size, num_top, scratch);
            for (int64_t k = 0; k < num_top; ++k) {
                const int32_t id = scratch.ids[k];
                top_ids[i * num_top + k] = id;
                top[i * num_top + k] = row[id] - normalizer;
            }
        }
    }
}
