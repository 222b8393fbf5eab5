// Products of 8-bit integers, and rows rounded to them.
#include "../tiles.h"
#include "../units.h"

namespace infopt {
namespace INFOPT_ISA {

struct Integers {
    using Vector = vi;
    static constexpr std::int64_t kInputs = 4;

    template <int R, int V>
    static inline void add(vi (&sums)[R][V], const char* w, const RowAddresses<R>& x, std::int64_t offset) {
#if defined(__AVX512VNNI__)
        __m512i weights[V];
        for (int v = 0; v < V; ++v) weights[v] = _mm512_loadu_si512(w + v * kLanes * 4);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            std::int32_t four;
            std::memcpy(&four, x.at(r, offset), 4);
            const __m512i inputs = _mm512_set1_epi32(four);
            for (int v = 0; v < V; ++v)
                sums[r][v] = (vi)_mm512_dpbusd_epi32((__m512i)sums[r][v], inputs, weights[v]);
        }
#else
        // The even bytes and the odd ones of each word, as 16-bit numbers: two products to a lane.
        typedef std::int16_t vs __attribute__((vector_size(4 * kLanes)));
        vs even[V], odd[V];
        for (int v = 0; v < V; ++v) {
            const vs both = load<vs>(w + v * kLanes * 4);
            even[v] = (both << 8) >> 8;
            odd[v] = both >> 8;
        }
        for (int r = 0; r < R; ++r) {
            std::uint32_t four;
            std::memcpy(&four, x.at(r, offset), 4);
            const vi x_even = vi{} + static_cast<std::int32_t>(four & 0x00FF00FFu);
            const vi x_odd = vi{} + static_cast<std::int32_t>((four >> 8) & 0x00FF00FFu);
            for (int v = 0; v < V; ++v) sums[r][v] += pairs(even[v], (vs)x_even) + pairs(odd[v], (vs)x_odd);
        }
#endif
    }

#if !defined(__AVX512VNNI__)
    template <class V16>
    static inline vi pairs(V16 a, V16 b) {
#if defined(__AVX2__)
        return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
        return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#else
        const vi low_a = ((vi)a << 16) >> 16, low_b = ((vi)b << 16) >> 16;
        return low_a * low_b + ((vi)a >> 16) * ((vi)b >> 16);
#endif
    }
#endif

    static inline void finish(const Int8Args& args, std::int64_t row, std::int64_t at, const vi* sums) {
        if (args.n - at >= kPanel) return finish(args, row, at, sums, args.ends + at, args.scales + at);
        // An output's own numbers end where the outputs do.
        alignas(64) std::int32_t ends[kPanel] = {};
        alignas(64) float scales[kPanel] = {};
        std::memcpy(ends, args.ends + at, sizeof(std::int32_t) * (args.n - at));
        std::memcpy(scales, args.scales + at, sizeof(float) * (args.n - at));
        finish(args, row, at, sums, ends, scales);
    }

    static inline void finish(const Int8Args& args, std::int64_t row, std::int64_t at, const vi* sums,
                              const std::int32_t* ends, const float* scales) {
        vf values[kVectors];
        for (int v = 0; v < kVectors; ++v) {
            const vi whole = sums[v] - load<vi>(ends + v * kLanes);
            values[v] = __builtin_convertvector(whole, vf) * load<vf>(scales + v * kLanes) * args.x_scales[row];
        }
        put(args, row, at, values);
    }
};

static void linear_int8(const void* raw, std::int64_t part, std::int64_t parts) {
    const Int8Args& args = *static_cast<const Int8Args*>(raw);
#if defined(__AMX_TILE__)
    by_tiles<Integers, IntegerTiles>(args, part, parts);
#else
    by_units<Integers>(args, part, parts);
#endif
}

static inline float number(const void* x, std::int64_t at, std::int32_t type) {
    return type == kFloat32 ? static_cast<const float*>(x)[at] : to_float(static_cast<const bf16*>(x)[at]);
}

// The bits of the largest magnitude: those of what is not finite are above all others.
static inline std::uint32_t largest_bits(const QuantizeArgs& args, std::int64_t row) {
    vu most = {};
    const std::int64_t begin = row * args.x_stride;
    std::int64_t k = 0;
    for (; k + kLanes <= args.k; k += kLanes) {
        const vu bits = (vu)load_as(args.x, begin + k, args.x_type) & 0x7FFFFFFFu;
        most = bits > most ? bits : most;
    }
    std::uint32_t found = 0;
    for (int lane = 0; lane < kLanes; ++lane) found = most[lane] > found ? most[lane] : found;
    for (; k < args.k; ++k) {
        const float value = number(args.x, begin + k, args.x_type);
        std::uint32_t bits;
        std::memcpy(&bits, &value, 4);
        bits &= 0x7FFFFFFFu;
        found = bits > found ? bits : found;
    }
    return found;
}

static void quantize_rows(const void* raw, std::int64_t part, std::int64_t parts) {
    typedef std::uint8_t vb __attribute__((vector_size(kLanes)));
    const QuantizeArgs& args = *static_cast<const QuantizeArgs*>(raw);
    const Share share(rows_of(args), 1, part, parts);
    // Added and taken off again, it leaves the nearest integer.
    constexpr float kRound = 12582912.0f;
    const float low = static_cast<float>(-args.top), high = static_cast<float>(args.top - 1);
    for (std::int64_t row = share.begin; row < share.end; ++row) {
        const std::uint32_t bits = largest_bits(args, row);
        float amax;
        std::memcpy(&amax, &bits, 4);
        float scale = args.fixed != nullptr ? *args.fixed : amax / args.largest;
        if (scale == 0) scale = 1;
        args.scales[row] = bits >= 0x7F800000u ? __builtin_nanf("") : scale;
        std::uint8_t* steps = args.steps + row * args.steps_stride;
        const std::int64_t begin = row * args.x_stride;
        std::int64_t k = 0;
        for (; k + kLanes <= args.k; k += kLanes) {
            vf step = load_as(args.x, begin + k, args.x_type) / scale;
            step = step < low ? splat(low) : step > high ? splat(high) : step;
            const vi whole = (vi)(step + kRound) - (vi)splat(kRound);
            store(steps + k, __builtin_convertvector(whole + 128, vb));
        }
        for (; k < args.k; ++k) {
            float step = number(args.x, begin + k, args.x_type) / scale;
            step = step < low ? low : step > high ? high : step;
            const float shifted = step + kRound;
            std::int32_t whole;
            std::memcpy(&whole, &shifted, 4);
            steps[k] = static_cast<std::uint8_t>(whole - 0x4B400000 + 128);
        }
    }
}

extern const Entry int8_ops[] = {
    {"quantize_rows", quantize_rows, sizeof(QuantizeArgs)},
    {"linear_int8", linear_int8, sizeof(Int8Args)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
