// CRC-32 as zlib and Ethernet have it, by carry-less multiplication: 256 bytes are folded at a time
// where the CPU multiplies vectors of 512 bits that way, 64 elsewhere.
//
// After Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction"
// (Intel, 2009). What is left after folding, 16 bytes and the end, goes through a table.
#include <immintrin.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdint>

#define PAGEWIRE_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // bits reflected
constexpr int kLanes = 4;  // independent sums, so that multiplications need not wait for each other
constexpr int64_t kBlock = kLanes * sizeof(__m128i);
constexpr int64_t kWideBlock = kLanes * sizeof(__m512i);
constexpr int64_t kReceiveStep = 128 * 1024;  // bytes; with as much of the kernel's, half a cache
constexpr int64_t kAhead = 4096;  // bytes; the CPU itself prefetches no further than its page

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

// x to the power of `exponent` modulo the polynomial. Reflected, and so one bit further up: the
// product of two reflected numbers is one bit short.
constexpr int64_t power_of_x(int exponent) {
    uint32_t power = uint32_t{1} << 31;
    for (int i = 0; i < exponent; ++i) power = (power >> 1) ^ (power & 1 ? kPolynomial : 0);
    return int64_t{power} << 1;
}

// What the two halves of 128 bits are multiplied with to move on by `bits`: the lower half of
// reflected numbers is the one further away.
template <int bits>
struct Distance {
    static constexpr int64_t kLow = power_of_x(bits + 32);
    static constexpr int64_t kHigh = power_of_x(bits - 32);
};

#define PAGEWIRE_NARROW __attribute__((target("pclmul,sse4.1")))
#define PAGEWIRE_WIDE __attribute__((target("avx512f,vpclmulqdq,pclmul,sse4.1")))

PAGEWIRE_NARROW inline __m128i load(const uint8_t* data) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(data));
}

// `sum` moved on by `bits`, plus what is there.
template <int bits>
PAGEWIRE_NARROW inline __m128i fold(__m128i sum, __m128i there) {
    const __m128i powers = _mm_set_epi64x(Distance<bits>::kHigh, Distance<bits>::kLow);
    const __m128i low = _mm_clmulepi64_si128(sum, powers, 0x00);
    const __m128i high = _mm_clmulepi64_si128(sum, powers, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), there);
}

// The remainder of sums that stand 16 bytes apart.
PAGEWIRE_NARROW inline uint32_t remainder_of(const __m128i sums[kLanes]) {
    __m128i sum = sums[0];
    for (int lane = 1; lane < kLanes; ++lane) sum = fold<128>(sum, sums[lane]);
    alignas(16) uint8_t rest[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(rest), sum);
    return add_bytes(0, rest, 16);
}

// `size` is a multiple of kBlock and not 0.
PAGEWIRE_NARROW uint32_t add_blocks(uint32_t state, const uint8_t* data, int64_t size) {
    __m128i sums[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = load(data + 16 * lane);
    sums[0] = _mm_xor_si128(sums[0], _mm_cvtsi32_si128(static_cast<int>(state)));
    for (int64_t at = kBlock; at < size; at += kBlock)
        for (int lane = 0; lane < kLanes; ++lane)
            sums[lane] = fold<8 * kBlock>(sums[lane], load(data + at + 16 * lane));
    return remainder_of(sums);
}

// As `fold`, for four times 128 bits side by side.
template <int bits>
PAGEWIRE_WIDE inline __m512i fold_wide(__m512i sum, __m512i there) {
    constexpr int64_t kHigh = Distance<bits>::kHigh, kLow = Distance<bits>::kLow;
    const __m512i powers = _mm512_set4_epi64(kHigh, kLow, kHigh, kLow);
    const __m512i low = _mm512_clmulepi64_epi128(sum, powers, 0x00);
    const __m512i high = _mm512_clmulepi64_epi128(sum, powers, 0x11);
    constexpr int kXorOfThree = 0x96;
    return _mm512_ternarylogic_epi64(low, high, there, kXorOfThree);
}

// `size` is a multiple of kWideBlock and not 0.
PAGEWIRE_WIDE uint32_t add_wide_blocks(uint32_t state, const uint8_t* data, int64_t size) {
    __m512i wide[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) wide[lane] = _mm512_loadu_si512(data + 64 * lane);
    const __m128i before = _mm_cvtsi32_si128(static_cast<int>(state));
    wide[0] = _mm512_xor_si512(wide[0], _mm512_zextsi128_si512(before));
    for (int64_t at = kWideBlock; at < size; at += kWideBlock) {
        for (int lane = 0; lane < kLanes; ++lane) {
            const uint8_t* there = data + at + 64 * lane;
            _mm_prefetch(reinterpret_cast<const char*>(there + kAhead), _MM_HINT_T0);
            wide[lane] = fold_wide<8 * kWideBlock>(wide[lane], _mm512_loadu_si512(there));
        }
    }
    for (int lane = 1; lane < kLanes; ++lane) wide[lane] = fold_wide<512>(wide[lane - 1], wide[lane]);
    alignas(64) __m128i sums[kLanes];
    _mm512_store_si512(sums, wide[kLanes - 1]);
    return remainder_of(sums);
}

bool has_wide_multiplication() {
    return __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512f");
}

}  // namespace

// Whether this CPU can run `pagewire_crc32`.
PAGEWIRE_EXPORT int32_t pagewire_crc32_is_supported() {
    return __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
}

// The CRC-32 of what had `value`, followed by `size` bytes of `data`.
PAGEWIRE_EXPORT uint32_t pagewire_crc32(uint32_t value, const uint8_t* data, int64_t size) {
    static const bool is_wide = has_wide_multiplication();
    uint32_t state = ~value;
    if (const int64_t folded = is_wide ? size / kWideBlock * kWideBlock : 0) {
        state = add_wide_blocks(state, data, folded);
        data += folded;
        size -= folded;
    }
    if (const int64_t folded = size / kBlock * kBlock) {
        state = add_blocks(state, data, folded);
        data += folded;
        size -= folded;
    }
    return ~add_bytes(state, data, size);
}

// Takes up to `size` bytes that have arrived at a socket to `data`, and brings `value` up to date
// with each step while that is still in a cache. The number of bytes; 0 when the peer has closed;
// when none are there, or the connection has failed, the negative error number.
PAGEWIRE_EXPORT int64_t pagewire_receive_crc32(int32_t socket, uint8_t* data, int64_t size,
                                               uint32_t* value) {
    int64_t done = 0;
    while (done < size) {
        const int64_t step = std::min(size - done, kReceiveStep);
        const int64_t count = recv(socket, data + done, step, MSG_DONTWAIT);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return done > 0 ? done : count < 0 ? -errno : 0;
        *value = pagewire_crc32(*value, data + done, count);
        done += count;
    }
    return done;
}
