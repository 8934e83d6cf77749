// What all CPU kernels share: vectors of floats, storage types, dispatch by dtype.
//
// A kernel is a template over its storage type, computes in float32 and is compiled once per
// instruction set from the same source. Shapes, strides and counts are int64 and in elements.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

// Everything else is hidden, so that libraries for two instruction sets can live in one process.
#define PAGEWIRE_EXPORT extern "C" __attribute__((visibility("default")))

#if defined(__AVX512F__) || defined(__AVX2__)
// GCC 12 takes the undefined vectors of its own header for mistakes of ours.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace pagewire {

// ---- vectors ------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(kLanes * 4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4)));
typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Halves __attribute__((vector_size(kLanes * 2)));
typedef int8_t Bytes __attribute__((vector_size(kLanes)));

inline Floats broadcast(float value) { return Floats{} + value; }

inline float sum(Floats values) {
    float total = 0.0f;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += values[lane];
    return total;
}

inline float max(Floats values) {
    float largest = values[0];
    for (int64_t lane = 1; lane < kLanes; ++lane)
        if (values[lane] > largest) largest = values[lane];
    return largest;
}

#if defined(__AVX512F__)
inline int32_t largest_lane(Ints values) { return _mm512_reduce_max_epi32((__m512i)values); }
inline int32_t sum_of_lanes(Ints values) { return _mm512_reduce_add_epi32((__m512i)values); }
#else
inline int32_t largest_lane(Ints values) {
    int32_t largest = values[0];
    for (int64_t lane = 1; lane < kLanes; ++lane)
        if (values[lane] > largest) largest = values[lane];
    return largest;
}
inline int32_t sum_of_lanes(Ints values) {
    int32_t total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += values[lane];
    return total;
}
#endif

// A product as it is in float32: the compiler may not round it together with a later addition.
inline Floats rounded(Floats values) {
#if defined(__x86_64__)
    asm("" : "+v"(values));
#else
    asm("" : "+w"(values));
#endif
    return values;
}

// The nearest integers, halves to even.
inline Ints nearest_integers(Floats values) {
#if defined(__AVX512F__)
    return (Ints)_mm512_cvtps_epi32((__m512)values);
#elif defined(__AVX2__)
    return (Ints)_mm256_cvtps_epi32((__m256)values);
#else
    return (Ints)vcvtnq_s32_f32((float32x4_t)values);
#endif
}

// Rounds to the nearest integer, halves to even, for |values| < 2^22: beyond 2^23 a float has no
// fraction bits, so the addition itself rounds.
inline Floats round_to_even(Floats values) {
    const Floats magic = broadcast(12582912.0f);
    return (values + magic) - magic;
}

// e^x with a relative error of about 1e-7; 0 below -87.3, infinity above 88.3, NaN for NaN.
// Splits x into n ln 2 + r with |r| <= ln 2 / 2 and adds n to the exponent of a polynomial in r.
inline Floats exp(Floats x) {
    const Floats lowest = broadcast(-87.3f), highest = broadcast(88.3f);
    const Floats clamped = x > highest ? highest : x;
    const Floats n = round_to_even(clamped * 1.44269504f);
    const Floats r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
    const Floats result = p * (Floats)exponent;
    return x < lowest ? Floats{} : (x > highest ? broadcast(__builtin_inff()) : result);
}

// ---- storage types ------------------------------------------------------------------------------

struct BFloat16 {
    uint16_t bits;
};

struct Float16 {
    uint16_t bits;
};

inline Floats load(const float* from) {
    Floats values;
    std::memcpy(&values, from, sizeof values);
    return values;
}

inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }

// kLanes integers, widened. Left to itself GCC does it in halves or lane by lane.
#if defined(__AVX512F__)
inline Bits load_wide(const uint16_t* from) {
    return (Bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline Ints load_wide(const int8_t* from) {
    return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#elif defined(__AVX2__)
inline Bits load_wide(const uint16_t* from) {
    return (Bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline Ints load_wide(const int8_t* from) {
    return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
#else
inline Bits load_wide(const uint16_t* from) { return (Bits)vmovl_u16(vld1_u16(from)); }
inline Ints load_wide(const int8_t* from) {
    int32_t word;
    std::memcpy(&word, from, sizeof word);
    const int16x8_t halves = vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(word)));
    return (Ints)vmovl_s16(vget_low_s16(halves));
}
#endif

inline Floats load(const BFloat16* from) { return (Floats)(load_wide(&from->bits) << 16); }

inline Floats load(const int8_t* from) {
    return __builtin_convertvector(load_wide(from), Floats);
}

// Rounds to nearest, halves to even; a NaN stays one.
inline void store(BFloat16* to, Floats values) {
    const Bits bits = (Bits)values;
    const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Bits quiet_nan = (bits >> 16) | 0x40;
    const Bits chosen = values == values ? rounded : quiet_nan;
    const Halves halves = __builtin_convertvector(chosen, Halves);
    std::memcpy(to, &halves, sizeof halves);
}

#if defined(__AVX512F__)
inline Floats load(const Float16* from) {
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
inline void store(Float16* to, Floats values) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
inline Floats load(const Float16* from) {
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline void store(Float16* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                     _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
}
#else
inline Floats load(const Float16* from) {
    return (Floats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from->bits)));
}
inline void store(Float16* to, Floats values) {
    vst1_u16(&to->bits, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)values)));
}
#endif

// Integers that fit in 8 bits, or floats next to such.
inline void store(int8_t* to, Ints values) {
#if defined(__AVX512F__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
#else
    const Bytes bytes = __builtin_convertvector(values, Bytes);
    std::memcpy(to, &bytes, sizeof bytes);
#endif
}

inline void store(int8_t* to, Floats values) { store(to, nearest_integers(values)); }

// The first `count` < kLanes elements; the other lanes are 0.
template <typename T>
Floats load_first(const T* from, int64_t count) {
    T padded[kLanes] = {};
    std::memcpy(padded, from, count * sizeof(T));
    return load(padded);
}

template <typename T>
void store_first(T* to, Floats values, int64_t count) {
    T padded[kLanes];
    store(padded, values);
    std::memcpy(to, padded, count * sizeof(T));
}

// Calls step(index, load, store) for each vector of `dim` elements; the last one may be partial, and
// `load` and `store` then touch nothing behind the end. Lanes behind the end are loaded as 0.
template <typename Step>
inline __attribute__((always_inline)) void for_each_vector(int64_t dim, Step step) {
    int64_t index = 0;
    for (; index + kLanes <= dim; index += kLanes)
        step(
            index, [](const auto* from) { return load(from); },
            [](auto* to, Floats values) { store(to, values); });
    const int64_t rest = dim - index;
    if (rest > 0)
        step(
            index, [rest](const auto* from) { return load_first(from, rest); },
            [rest](auto* to, Floats values) { store_first(to, values, rest); });
}

// ---- dispatch -----------------------------------------------------------------------------------

// The codes of DTYPE_CODES in native_library.py.
enum : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// Calls body with a null pointer to the storage type that `dtype` names.
template <typename Body>
void dispatch(int64_t dtype, Body body) {
    switch (dtype) {
        case kFloat32:
            return body(static_cast<float*>(nullptr));
        case kBFloat16:
            return body(static_cast<BFloat16*>(nullptr));
        case kFloat16:
            return body(static_cast<Float16*>(nullptr));
    }
}

// Elements that one thread handles sooner than a second one is woken.
constexpr int64_t kSerialElements = 32768;

}  // namespace pagewire
