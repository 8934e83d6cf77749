// Loops whose counts the compiler knows, so that what they sum up stays in registers.
#pragma once

#include <cstdint>
#include <type_traits>

// In front of the loops over accumulators: only when these are unrolled early does GCC keep the
// accumulators in registers from the start, instead of clearing them in memory first.
#define UNROLL _Pragma("GCC unroll 16")

namespace pagewire {

// Calls body(std::integral_constant<int64_t, min(n, Most)>) for n >= 1.
template <int64_t Most, typename Body>
void with_constant(int64_t n, Body body) {
    if constexpr (Most == 1) {
        body(std::integral_constant<int64_t, 1>{});
    } else {
        if (n >= Most) return body(std::integral_constant<int64_t, Most>{});
        with_constant<Most - 1>(n, body);
    }
}

}  // namespace pagewire
