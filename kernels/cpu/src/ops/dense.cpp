// Products with dense weights in float32 and bfloat16, and rows of such weights.
#include "../curves.h"
#include "../tiles.h"
#include "../units.h"

namespace infopt {
namespace INFOPT_ISA {

// Row by row, so that an input is in a register for no longer than it takes.
struct DenseFloat32 : Float32 {
    using Vector = vf;
    static constexpr std::int64_t kInputs = 1;

    template <int R, int V>
    static inline void add(vf (&sums)[R][V], const char* w, const RowAddresses<R>& x, std::int64_t offset) {
        vf weights[V];
        for (int v = 0; v < V; ++v) weights[v] = load<vf>(w + v * kLanes * 4);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const vf input = splat(number(x.at(r, offset)));
            for (int v = 0; v < V; ++v) sums[r][v] += weights[v] * input;
        }
    }

    static inline void finish(const DenseArgs& args, std::int64_t row, std::int64_t at, const vf* sums) {
        put(args, row, at, sums);
    }
};

struct DenseBFloat16 : BFloat16 {
    using Vector = vf;
    static constexpr std::int64_t kInputs = 2;

    template <int R, int V>
    static inline void add(vf (&sums)[R][V], const char* w, const RowAddresses<R>& x, std::int64_t offset) {
#if defined(__AVX512BF16__)
        __m512bh weights[V];
        for (int v = 0; v < V; ++v) weights[v] = (__m512bh)_mm512_loadu_si512(w + v * kLanes * 4);
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            std::int32_t both;
            std::memcpy(&both, x.at(r, offset), 4);
            const __m512bh inputs = (__m512bh)_mm512_set1_epi32(both);
            for (int v = 0; v < V; ++v)
                sums[r][v] = (vf)_mm512_dpbf16_ps((__m512)sums[r][v], weights[v], inputs);
        }
#else
        vf even[V], odd[V];
        for (int v = 0; v < V; ++v) {
            const vu pairs = load<vu>(w + v * kLanes * 4);
            even[v] = (vf)(pairs << 16);
            odd[v] = (vf)(pairs & 0xFFFF0000u);
        }
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            const vf x0 = splat(number(x.at(r, offset))), x1 = splat(number(x.at(r, offset + 2)));
            for (int v = 0; v < V; ++v) {
                sums[r][v] += even[v] * x0;
                sums[r][v] += odd[v] * x1;
            }
        }
#endif
    }

    static inline void finish(const DenseArgs& args, std::int64_t row, std::int64_t at, const vf* sums) {
        put(args, row, at, sums);
    }
};

template <class Form>
static void linear(const void* raw, std::int64_t part, std::int64_t parts) {
    by_units<Form>(*static_cast<const DenseArgs*>(raw), part, parts);
}

#if defined(__AMX_TILE__)
static void linear_bfloat16(const void* raw, std::int64_t part, std::int64_t parts) {
    by_tiles<DenseBFloat16, BFloat16Tiles>(*static_cast<const DenseArgs*>(raw), part, parts);
}

// Gates and ups of the same rows one after the other, so that neither is written.
template <int curve>
static void gated(const GatedArgs& args, std::int64_t part, std::int64_t parts) {
    const std::int64_t bytes = args.k * 2, stride = args.x_stride * 2;
    const std::int64_t panel_bytes = args.k / 2 * kUnitBytes, half = args.n / kPanel * panel_bytes;
    Tiles tiles;
    TileSums gates, ups;
    const auto finish = [&](std::int64_t row, std::int64_t r, std::int64_t at) {
        for (int v = 0; v < kVectors; ++v, at += kLanes) {
            const vf gate = load<vf>(gates.at[r] + v * kLanes), up = load<vf>(ups.at[r] + v * kLanes);
            const vf found = activated<curve>(gate) * up;
            if (args.out) store(args.out + row * args.n + at, found);
            if (args.rounded) store(args.rounded + row * args.rounded_stride + at, narrow(found));
        }
    };
    const auto product = [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
        const char* w = static_cast<const char*>(args.weight) + panel * panel_bytes;
        const Ahead low(w, w + panel_bytes, bytes, rows), high(w + half, w + half + panel_bytes, bytes, rows);
        for_tiles(tiles, static_cast<const char*>(args.x) + row0 * stride, stride, rows,
                  [&](const TileRows& some, std::int64_t row) {
                      tile_rows<BFloat16Tiles>(some, row, bytes, w, low, gates);
                      tile_rows<BFloat16Tiles>(some, row, bytes, w + half, high, ups);
                      for (std::int64_t r = 0; r < some.rows; ++r) finish(row0 + row + r, r, panel * kPanel);
                  });
    };
    const std::int64_t m = rows_of(args);
    for_blocks(m, args.n, tiled_rows(m, stride), part, parts, product);
}

static void gated_bfloat16(const void* raw, std::int64_t part, std::int64_t parts) {
    const GatedArgs& args = *static_cast<const GatedArgs*>(raw);
    switch (args.curve) {
        case SILU: return gated<SILU>(args, part, parts);
        case RELU: return gated<RELU>(args, part, parts);
        case GELU: return gated<GELU>(args, part, parts);
        default: return gated<GELU_TANH>(args, part, parts);
    }
}
#else
constexpr Op linear_bfloat16 = linear<DenseBFloat16>;
#endif

// A row is every 32nd unit of a panel: one number in float32, a pair of them in bfloat16.
template <class T, std::int64_t PerUnit>
static void rows(const void* raw, std::int64_t part, std::int64_t parts) {
    const RowsArgs& args = *static_cast<const RowsArgs*>(raw);
    const Share share(rows_of(args), 1, part, parts);
    const std::int64_t units = args.k / PerUnit;
    for (std::int64_t row = share.begin; row < share.end; ++row) {
        const std::int64_t id = args.ids[row];
        const std::uint32_t* from = static_cast<const std::uint32_t*>(args.weight) +
                                    id / kPanel * units * kPanel + id % kPanel;
        if (args.y_type == kFloat32 && PerUnit == 2) {
            float* to = static_cast<float*>(args.y) + row * args.k;
            for (std::int64_t i = 0; i < units; ++i) {
                const char* pair = reinterpret_cast<const char*>(from + i * kPanel);
                to[2 * i] = T::number(pair);
                to[2 * i + 1] = T::number(pair + 2);
            }
            continue;
        }
        std::uint32_t* to = static_cast<std::uint32_t*>(args.y) + row * units;
        for (std::int64_t i = 0; i < units; ++i) to[i] = from[i * kPanel];
    }
}

extern const Entry dense_ops[] = {
    {"linear_float32", linear<DenseFloat32>, sizeof(DenseArgs)},
    {"linear_bfloat16", linear_bfloat16, sizeof(DenseArgs)},
#if defined(__AMX_TILE__)
    {"gated_bfloat16", gated_bfloat16, sizeof(GatedArgs)},
#endif
    {"rows_float32", rows<Float32, 1>, sizeof(RowsArgs)},
    {"rows_bfloat16", rows<BFloat16, 2>, sizeof(RowsArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
