// Matrices in float32 or bfloat16, summed in float32.
//
// Every element of the result is one running sum over the input features in their order, whatever
// the rows beside it, the tile that computes it and the number of threads: a row is the same to the
// bit in every batch.
#include <algorithm>
#include <memory>

#include "common.h"
#include "functions.h"
#include "parts.h"
#include "unroll.h"

namespace pagewire {
namespace {

// A panel is 32 output channels side by side, in two halves. A tile takes one vector of each half
// at a time.
constexpr int64_t kPanel = 32;
constexpr int64_t kHalf = kPanel / 2;

// Rows of a tile: two sums each, two vectors of weights and a broadcast fill the registers. Tiles of
// few rows take several panels for at least kSums sums: fewer would wait for one another.
#if defined(__AVX512F__)
constexpr int64_t kRows = 14, kSums = 16;
#elif defined(__AVX2__)
constexpr int64_t kRows = 6, kSums = 8;
#else
constexpr int64_t kRows = 12, kSums = 16;
#endif

// What stays in the second-level cache while it is used again and again: so many floats of x, and so
// many input features of a panel. Sums wait in memory between two blocks of features.
constexpr int64_t kBlockSize = 1 << 16;
constexpr int64_t kBlockDepth = 640;

// Input features between the weights that are multiplied and those that are fetched.
constexpr int64_t kAhead = 48;
constexpr int64_t kCacheLine = 64;  // bytes

// Products that one thread computes sooner than a second one is woken.
constexpr int64_t kSerialProducts = 1 << 17;

constexpr int64_t panels_of(int64_t rows) { return std::max<int64_t>(1, kSums / 2 / rows); }

template <typename W>
struct Matrix {
    const W* weight;    // float [num_panels, in_features, kPanel], BFloat16 [.., kHalf, 2]
    const float* bias;  // [num_panels * kPanel]
    int64_t in_features;
    int64_t out_features;

    int64_t num_panels() const { return (out_features + kPanel - 1) / kPanel; }
    int64_t num_channels() const { return num_panels() * kPanel; }
};

// A tile of R rows.
template <typename T>
struct Tile {
    const float* x;  // [in_features, R]
    float* sums;     // [num_panels, R, kPanel], over the features in front of a block
    T* out;          // [R, out_features]
};

struct Features {
    int64_t begin;
    int64_t end;
};

template <typename W>
inline void prefetch(const W* weight) {
    UNROLL for (int64_t i = 0; i < kPanel; i += kCacheLine / sizeof(W))
        __builtin_prefetch(weight + i);
}

// The weights of one input feature for channels `lane` .. and kHalf + lane .. of a panel.
inline void load_halves(const float* weight, int64_t lane, Floats& first, Floats& second) {
    first = load(weight + lane);
    second = load(weight + kHalf + lane);
}

// One word holds a channel of each half: widening takes one instruction for either.
inline void load_halves(const BFloat16* weight, int64_t lane, Floats& first, Floats& second) {
    Bits words;
    std::memcpy(&words, weight + 2 * lane, sizeof words);
    first = (Floats)(words << 16);
    second = (Floats)(words & 0xffff0000);
}

template <typename W, typename T>
void store_channels(const Matrix<W>& matrix, int64_t channel, Floats sums, T* out) {
    const Floats values = sums + load(matrix.bias + channel);
    const int64_t count = matrix.out_features - channel;
    if (count >= kLanes)
        store(out + channel, values);
    else if (count > 0)
        store_first(out + channel, values, count);
}

// Calls body(r, p, half) for every sum of R rows times P panels.
template <int64_t R, int64_t P, typename Body>
inline __attribute__((always_inline)) void for_each_sum(Body body) {
    UNROLL for (int64_t r = 0; r < R; ++r)
        UNROLL for (int64_t p = 0; p < P; ++p)
            UNROLL for (int64_t half = 0; half < 2; ++half) body(r, p, half);
}

// R rows times P panels, over a block of features.
template <int64_t R, int64_t P, typename W, typename T>
void multiply_tile(const Matrix<W>& matrix, const Tile<T>& tile, Features block, int64_t panel,
                   int64_t lane) {
    const int64_t depth = matrix.in_features;
    const W* weight = matrix.weight + panel * depth * kPanel;
    const auto channel = [&](int64_t p, int64_t half) {
        return (panel + p) * kPanel + half * kHalf + lane;
    };
    const auto so_far = [&](int64_t r, int64_t p, int64_t half) {
        return tile.sums + ((panel + p) * R + r) * kPanel + half * kHalf + lane;
    };
    Floats sums[R][P][2] = {};
    if (block.begin > 0)
        for_each_sum<R, P>([&](int64_t r, int64_t p, int64_t half) {
            sums[r][p][half] = load(so_far(r, p, half));
        });
    for (int64_t k = block.begin; k < block.end; ++k) {
        Floats weights[P][2];
        UNROLL for (int64_t p = 0; p < P; ++p) {
            const W* feature = weight + (p * depth + k) * kPanel;
            prefetch(feature + kAhead * kPanel);
            load_halves(feature, lane, weights[p][0], weights[p][1]);
        }
        for_each_sum<R, P>([&](int64_t r, int64_t p, int64_t half) {
            sums[r][p][half] += tile.x[k * R + r] * weights[p][half];
        });
    }
    if (block.end < depth)
        for_each_sum<R, P>([&](int64_t r, int64_t p, int64_t half) {
            store(so_far(r, p, half), sums[r][p][half]);
        });
    else
        for_each_sum<R, P>([&](int64_t r, int64_t p, int64_t half) {
            store_channels(matrix, channel(p, half), sums[r][p][half],
                           tile.out + r * matrix.out_features);
        });
}

inline float to_float(float value) { return value; }

inline float to_float(BFloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// Transposes a tile, so that a step of multiply_tile reads one run; to: [depth, R].
template <int64_t R, typename W>
void pack_tile(const W* x, int64_t depth, float* to) {
    for (int64_t k = 0; k < depth; ++k)
        for (int64_t r = 0; r < R; ++r) to[k * R + r] = to_float(x[r * depth + k]);
}

// One tile times consecutive panels.
template <int64_t R, typename W, typename T>
void multiply_panels(const Matrix<W>& matrix, const Tile<T>& tile, Features block, int64_t panel,
                     int64_t num_panels) {
    for_each_tile<panels_of(R)>(panel, panel + num_panels, [&](int64_t first, auto count) {
        for (int64_t lane = 0; lane < kHalf; lane += kLanes)
            multiply_tile<R, count()>(matrix, tile, block, first, lane);
    });
}

template <typename W, typename T>
void multiply(const Matrix<W>& matrix, const W* x, int64_t rows, T* out) {
    const int64_t depth = matrix.in_features;
    const Parts tiles = parts_of(rows, kRows);
    // One tile reads every weight once, so there is nothing to keep in a cache.
    const Parts blocks = tiles.count > 1 ? parts_of(depth, kBlockDepth) : Parts{depth, 1};
    const Parts groups = parts_of(
        tiles.count, std::max<int64_t>(1, kBlockSize * blocks.count / (kRows * depth)));
    const int64_t products = rows * depth * matrix.out_features;
    const Parts strips = parts_for_threads(matrix.num_panels(), products / groups.count);
    const std::unique_ptr<float[]> packed(new float[rows * depth]);
    const std::unique_ptr<float[]> sums(
        new float[blocks.count > 1 ? rows * matrix.num_channels() : 0]);
#pragma omp parallel if (products > kSerialProducts)
    {
#pragma omp for
        for (int64_t tile = 0; tile < tiles.count; ++tile)
            with_constant<kRows>(tiles.size(tile), [&](auto size) {
                const int64_t start = tiles.start(tile) * depth;
                pack_tile<size()>(x + start, depth, packed.get() + start);
            });
        for (int64_t block = 0; block < blocks.count; ++block) {
            const Features features{blocks.start(block), blocks.start(block + 1)};
            // Whoever is free takes the next: a thread may have to share its core for a while.
#pragma omp for collapse(2) schedule(dynamic)
            for (int64_t group = 0; group < groups.count; ++group)
                for (int64_t strip = 0; strip < strips.count; ++strip)
                    for (int64_t tile = groups.start(group); tile < groups.start(group + 1); ++tile)
                        with_constant<kRows>(tiles.size(tile), [&](auto size) {
                            const int64_t row = tiles.start(tile);
                            multiply_panels<size()>(matrix,
                                                    Tile<T>{packed.get() + row * depth,
                                                            sums.get() + row * matrix.num_channels(),
                                                            out + row * matrix.out_features},
                                                    features, strips.start(strip),
                                                    strips.size(strip));
                        });
        }
    }
}

}  // namespace
}  // namespace pagewire

using namespace pagewire;

// out = x weightᵀ + bias. x: [rows, in_features], rows > 0, in the dtype of the weights: float32 or
// bfloat16; weight and bias as in Matrix, filled up to whole panels; out: [rows, out_features], in
// that dtype or in float32.
PAGEWIRE_EXPORT void linear_float(int64_t dtype, int64_t out_dtype, const void* x,
                                  const void* weight, const void* bias, void* out, int64_t rows,
                                  int64_t in_features, int64_t out_features) {
    const auto run = [&](auto* weight_type, auto* out_type) {
        using W = std::remove_pointer_t<decltype(weight_type)>;
        using T = std::remove_pointer_t<decltype(out_type)>;
        const Matrix<W> matrix{static_cast<const W*>(weight), static_cast<const float*>(bias),
                               in_features, out_features};
        multiply(matrix, static_cast<const W*>(x), rows, static_cast<T*>(out));
    };
    float* const float32 = nullptr;
    BFloat16* const bfloat16 = nullptr;
    if (dtype == kFloat32)
        run(float32, float32);
    else if (out_dtype == kFloat32)
        run(bfloat16, float32);
    else
        run(bfloat16, bfloat16);
}
