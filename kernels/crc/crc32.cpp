// CRC-32 as zlib and Ethernet have it, by carry-less multiplication: 64 bytes are folded at a time.
//
// After Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction"
// (Intel, 2009). What is left after folding, 16 bytes and the end, goes through a table.
#include <immintrin.h>

#include <array>
#include <cstdint>

#define PAGEWIRE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // bits reflected
constexpr int64_t kBlock = 64;

constexpr std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t state = byte;
        for (int bit = 0; bit < 8; ++bit) state = (state >> 1) ^ (state & 1 ? kPolynomial : 0);
        table[byte] = state;
    }
    return table;
}

constexpr std::array<uint32_t, 256> kTable = make_table();

uint32_t add_bytes(uint32_t state, const uint8_t* data, int64_t size) {
    for (int64_t i = 0; i < size; ++i) state = kTable[(state ^ data[i]) & 0xff] ^ (state >> 8);
    return state;
}

__attribute__((target("pclmul,sse4.1"))) inline __m128i load(const uint8_t* data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// `sum` moved on by the distance that `powers` stand for, plus what is there.
__attribute__((target("pclmul,sse4.1"))) inline __m128i fold(__m128i sum, __m128i powers,
                                                              __m128i there) {
    const __m128i low = _mm_clmulepi64_si128(sum, powers, 0x00);
    const __m128i high = _mm_clmulepi64_si128(sum, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// `size` is a multiple of kBlock and not 0.
__attribute__((target("pclmul,sse4.1"))) uint32_t add_blocks(uint32_t state, const uint8_t* data,
                                                              int64_t size) {
    // x^(d+32) and x^(d-32) modulo the polynomial, reflected, for distances d of 512 and 128 bits.
    const __m128i by_block = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
    const __m128i by_lane = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    __m128i sums[4];
    for (int lane = 0; lane < 4; ++lane) sums[lane] = load(data + 16 * lane);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    for (int64_t at = kBlock; at < size; at += kBlock)
        for (int lane = 0; lane < 4; ++lane)
            sums[lane] = fold(sums[lane], by_block, load(data + at + 16 * lane));
    __m128i sum = sums[0];
    for (int lane = 1; lane < 4; ++lane) sum = fold(sum, by_lane, sums[lane]);
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), sum);
    return add_bytes(0, rest, 16);
}

}  // namespace

// Whether this CPU can run `pagewire_crc32`.
PAGEWIRE_EXPORT int32_t pagewire_crc32_is_supported() {
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

// The CRC-32 of what had `value`, followed by `size` bytes of `data`.
PAGEWIRE_EXPORT uint32_t pagewire_crc32(uint32_t value, const uint8_t* data, int64_t size) {
    const int64_t folded = size / kBlock * kBlock;
    uint32_t state = ~value;
    if (folded) state = add_blocks(state, data, folded);
    return ~add_bytes(state, data + folded, size - folded);
}
