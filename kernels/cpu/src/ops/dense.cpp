// Products with dense weights in float32 and bfloat16, and rows of such weights.
#include "../panels.h"

namespace infopt {
namespace INFOPT_ISA {

// A slice of the inputs of a product, and the sums of the slices before, by row of its block.
struct Slice {
    std::int64_t begin, end;
    float (*kept)[kPanel];
};

// Sums of a chunk of R rows and V vectors of a panel: begun, gone on with, and ended.
template <int R, int V>
struct Sums {
    vf at[R][V];

    Sums(const Slice& slice, std::int64_t row, int first) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < V; ++v)
                at[r][v] = slice.begin == 0 ? vf{} : load<vf>(slice.kept[row + r] + (first + v) * kLanes);
    }

    void end(const DenseArgs& args, const Slice& slice, std::int64_t row0, std::int64_t row,
             std::int64_t panel, int first) {
#pragma GCC unroll 12
        for (int r = 0; r < R; ++r) {
            if (slice.end < args.k) {
                for (int v = 0; v < V; ++v) store(slice.kept[row + r] + (first + v) * kLanes, at[r][v]);
                continue;
            }
            put<V>(args, row0 + row + r, panel * kPanel + first * kLanes, at[r]);
        }
    }
};

// Row by row, so that an input is in a register for no longer than it takes.
struct DenseFloat32 : Float32 {
    static constexpr std::int64_t kStep = 1;

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
};

struct DenseBFloat16 : BFloat16 {
    static constexpr std::int64_t kStep = 2;

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
};

// A unit of a panel's row is 4 bytes: one number of float32, two inputs' of bfloat16.
template <class T, int R, int V>
static inline void chunk(const DenseArgs& args, const Slice& slice, std::int64_t row0, std::int64_t row,
                         std::int64_t panel, int first) {
    const std::int64_t stride = args.x_stride * T::kSize;
    const RowAddresses<R> x(static_cast<const char*>(args.x) + (row0 + row) * stride, stride);
    const char* w = static_cast<const char*>(args.weight) +
                    ((panel * args.k + slice.begin) / T::kStep * kPanel + first * kLanes) * 4;
    Sums<R, V> sums(slice, row, first);
    for (std::int64_t k = slice.begin; k < slice.end; k += T::kStep, w += kPanel * 4) {
        for (int v = 0; v < V * kLanes / 16; ++v) prefetch(w + v * 64 + kAhead);
        T::add(sums.at, w, x, k * T::kSize);
    }
    sums.end(args, slice, row0, row, panel, first);
}

template <class T>
static void linear(const void* raw, std::int64_t part, std::int64_t parts) {
    const DenseArgs& args = *static_cast<const DenseArgs*>(raw);
    const auto product = [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
        if (rows == 1) return chunk<T, 1, kVectors>(args, {0, args.k, nullptr}, row0, 0, panel, 0);
        alignas(64) float kept[kBlockRows][kPanel];
        const std::int64_t step = rows <= kMost ? args.k : kSlice;
        for (std::int64_t k = 0; k < args.k; k += step) {
            const Slice slice{k, k + step < args.k ? k + step : args.k, kept};
            for_chunks(0, rows, [&](auto count, std::int64_t row) {
                for (int v = 0; v < kVectors; v += kWide)
                    chunk<T, decltype(count)::value, kWide>(args, slice, row0, row, panel, v);
            });
        }
    };
    for_panels(rows_of(args), args.n, args.k * T::kSize, part, parts, product);
}

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
    {"linear_bfloat16", linear<DenseBFloat16>, sizeof(DenseArgs)},
    {"rows_float32", rows<Float32, 1>, sizeof(RowsArgs)},
    {"rows_bfloat16", rows<BFloat16, 2>, sizeof(RowsArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
