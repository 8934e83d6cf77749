// How the threads of a kernel divide what it computes.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>

#include "unroll.h"

namespace pagewire {

// `total` things in `count` consecutive parts whose sizes differ by one at most.
struct Parts {
    int64_t total;
    int64_t count;

    int64_t start(int64_t part) const { return total * part / count; }
    int64_t size(int64_t part) const { return start(part + 1) - start(part); }
};

// Products of a part: many more than taking it costs, few enough that no thread waits long for the
// last one.
constexpr int64_t kPartProducts = 1 << 20;

inline int64_t ceil_div(int64_t total, int64_t size) { return (total + size - 1) / size; }

inline Parts parts_of(int64_t total, int64_t largest) { return {total, ceil_div(total, largest)}; }

// Parts that threads take one after the other, as many for each: one for each thread of what is
// `products` products in all, more where these are many.
inline Parts parts_for_threads(int64_t total, int64_t products) {
    const int64_t num_threads = omp_get_max_threads();
    const int64_t count = ceil_div(ceil_div(products, kPartProducts), num_threads) * num_threads;
    return {total, std::min(count, total)};
}

// Calls body(start, integral_constant) for tiles of up to Max items, as equal as can be, that together
// cover start .. end: the number of items is then known to the compiler, and their sums stay in
// registers.
template <int64_t Max, typename Body>
inline void for_each_tile(int64_t start, int64_t end, const Body& body) {
    while (start < end) {
        const int64_t num_tiles = (end - start + Max - 1) / Max;
        const int64_t size = (end - start + num_tiles - 1) / num_tiles;
        with_constant<Max>(size, [&](auto num_items) { body(start, num_items); });
        start += size;
    }
}

}  // namespace pagewire
