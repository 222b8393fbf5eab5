// Products of inputs in 8 bits with 4-bit weights in groups.
#include "../groups8.h"
#include "../panels.h"

namespace infopt {
namespace INFOPT_ISA {

// Of a block of 32 inputs: 16-bit words of a tile of 16 outputs, and of both.
constexpr std::int64_t kTileWords = 4 * 32;
constexpr std::int64_t kBlock = 32, kBlockWords = 2 * kTileWords;
// Inputs that are summed at a time where there are many rows.
constexpr std::int64_t kSlice = 1024;

// sums + four codes (0 to 15) of each lane times the four steps of `x`.
static inline vi dot(vi sums, vu codes, std::int32_t x) {
#if defined(__AVX512VNNI__)
    return (vi)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)codes, _mm512_set1_epi32(x));
#elif defined(__AVX2__)
    // 2 * 15 * 127 is far from what 16 bits hold.
    const __m256i pairs = _mm256_maddubs_epi16((__m256i)codes, _mm256_set1_epi32(x));
    return sums + (vi)_mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
#else
    const auto step = [x](int byte) { return static_cast<std::int32_t>(static_cast<std::int8_t>(x >> 8 * byte)); };
    for (int byte = 0; byte < 4; ++byte) sums += (vi)((codes >> 8 * byte) & 0xFFu) * step(byte);
    return sums;
#endif
}

// The exact sums of a group, R rows and V vectors of outputs from `first` on. `x` has the steps of
// the group's first input. One row has two sums to each output, so that it need not wait for each.
template <int R, int V>
static inline void group_dots(vi (&total)[R][V], const std::uint16_t* codes, std::int64_t group, int first,
                              const RowAddresses<R>& x, std::int64_t k) {
    constexpr int kSums = R == 1 ? 2 : 1;
    vi sums[R][V][kSums] = {};
    for (std::int64_t in = 0; in < group; in += kBlock, codes += kBlockWords) {
        for (int line = 0; line < 8; ++line) prefetch<R>(codes + line * 32 + kAhead / 2);
#pragma GCC unroll 4
        for (int word = 0; word < 4; ++word) {
            vu low[V], high[V];
            for (int v = 0; v < V; ++v) {
                const int output = (first + v) * kLanes;
                const vu both = load<vu>(codes + output / 16 * kTileWords + word * 32 + output % 16 * 2);
                low[v] = both & 0x0F0F0F0Fu;
                high[v] = (both >> 4) & 0x0F0F0F0Fu;
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                std::int32_t steps[2];
                std::memcpy(steps, x.at(r, k + in + 8 * word), 8);
                for (int v = 0; v < V; ++v) {
                    sums[r][v][0] = dot(sums[r][v][0], low[v], steps[0]);
                    sums[r][v][kSums - 1] = dot(sums[r][v][kSums - 1], high[v], steps[1]);
                }
            }
        }
    }
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) total[r][v] = kSums == 1 ? sums[r][v][0] : sums[r][v][0] + sums[r][v][kSums - 1];
}

// A chunk of R rows, from `row` of the block on, over the inputs [begin, end).
template <int R, int V>
static inline void chunk(const Groups8Args& args, std::int64_t panel, std::int64_t row0, std::int64_t row,
                         std::int64_t begin, std::int64_t end, int first, float (*kept)[kPanel]) {
    typedef std::uint8_t vb __attribute__((vector_size(kLanes)));
    const RowAddresses<R> x(args.x + (row0 + row) * args.x_stride, args.x_stride);
    const std::int64_t groups = args.k / args.group;
    for (std::int64_t k = begin; k < end; k += args.group) {
        vi total[R][V];
        const std::uint16_t* codes = args.codes + (panel * args.k + k) / kBlock * kBlockWords;
        group_dots<R, V>(total, codes, args.group, first, x, k);
        const std::int64_t group = k / args.group;
        for (int v = 0; v < V; ++v) {
            const std::int64_t at = (panel * groups + group) * kPanel + (first + v) * kLanes;
            const vf scale = load_as(args.scales, at, args.scale_type);
            vi zero = vi{} + args.zero;
            if (args.zeros != nullptr) zero = __builtin_convertvector(load<vb>(args.zeros + at), vi);
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const std::int64_t own = (row0 + row + r) * groups + group;
                const vi whole = total[r][v] - zero * args.x_sums[own];
                float* sums = kept[row + r] + (first + v) * kLanes;
                store(sums, load<vf>(sums) + __builtin_convertvector(whole, vf) * (scale * args.x_scales[own]));
            }
        }
    }
}

static void linear_groups8(const void* raw, std::int64_t part, std::int64_t parts) {
    const Groups8Args& args = *static_cast<const Groups8Args*>(raw);
    for_panels(rows_of(args), args.n, args.k, part, parts, [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
        alignas(64) float sums[kBlockRows][kPanel];
        std::memset(sums, 0, sizeof(float) * kPanel * rows);
        std::int64_t step = rows <= kMost ? args.k : kSlice / args.group * args.group;
        if (step < args.group) step = args.group;
        for (std::int64_t k = 0; k < args.k; k += step) {
            const std::int64_t end = k + step < args.k ? k + step : args.k;
            for_few_chunks(rows, [&](auto count, std::int64_t row) {
                for (int v = 0; v < kVectors; v += kWide)
                    chunk<decltype(count)::value, kWide>(args, panel, row0, row, k, end, v, sums);
            });
        }
        for (std::int64_t row = 0; row < rows; ++row) {
            vf whole[kVectors];
            for (int v = 0; v < kVectors; ++v) whole[v] = load<vf>(sums[row] + v * kLanes);
            put(args, row0 + row, panel * kPanel, whole);
        }
    });
}

// The bits of the largest magnitude: those of what is not finite are above all others.
static inline std::uint32_t largest(const GroupStepsArgs& args, std::int64_t at) {
    vu most = {};
    for (std::int64_t k = 0; k < args.group; k += kLanes) {
        const vu bits = (vu)load_as(args.x, at + k, args.x_type) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    std::uint32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
    return found;
}

static void group_steps(const void* raw, std::int64_t part, std::int64_t parts) {
    const GroupStepsArgs& args = *static_cast<const GroupStepsArgs*>(raw);
    // Added and taken off again, it leaves the nearest integer.
    constexpr float kRound = 12582912.0f;
    constexpr int kOrder[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    const std::int64_t groups = args.k / args.group;
    const Share share(rows_of(args) * groups, 1, part, parts);
    for (std::int64_t i = share.begin; i < share.end; ++i) {
        const std::int64_t at = i / groups * args.x_stride + i % groups * args.group;
        const std::uint32_t bits = largest(args, at);
        const bool finite = bits < 0x7F800000u;
        float scale;
        std::memcpy(&scale, &bits, 4);
        scale = scale / 127.0f;
        if (scale == 0) scale = 1;
        std::int8_t* steps = args.steps + i / groups * args.steps_stride + i % groups * args.group;
        std::int32_t sum = 0;
        for (std::int64_t k = 0; k < args.group; k += kBlock) {
            alignas(64) std::int32_t whole[kBlock] = {};
            for (std::int64_t j = 0; j < kBlock && finite; j += kLanes) {
                vf step = load_as(args.x, at + k + j, args.x_type) / scale;
                // Beyond it where a scale is so small that it lost most of its bits.
                step = step < -127.0f ? splat(-127.0f) : step > 127.0f ? splat(127.0f) : step;
                store(whole + j, (vi)(step + kRound) - (vi)splat(kRound));
            }
            for (std::int64_t j = 0; j < kBlock; ++j) {
                sum += whole[j];
                steps[k + j] = static_cast<std::int8_t>(whole[j / 8 * 8 + kOrder[j % 8]]);
            }
        }
        args.scales[i] = finite ? scale : __builtin_nanf("");
        args.sums[i] = sum;
    }
}

extern const Entry groups8_ops[] = {
    {"group_steps", group_steps, sizeof(GroupStepsArgs)},
    {"linear_groups8", linear_groups8, sizeof(Groups8Args)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
