// Products with integer weights in groups, the inputs as they are.
#include "../panels.h"
#include "../tiles.h"

namespace infopt {
namespace INFOPT_ISA {

constexpr std::int64_t kBlock = 32;
constexpr int kPairs = 16;
// Inputs that are summed at a time where there are many rows.
constexpr std::int64_t kSlice = 512;

// A chunk of rows, a slice of whole groups, and the sums of all rows of the block.
struct Place {
    std::int64_t row0, row, panel, begin, end;
    float (*sums)[kPanel];
};

#if defined(__AVX512BF16__)

// Values of codes, looked up by their lowest bits; the bits above them do not matter, since the
// table repeats itself: 32 values of 16 bits, or 16 of 32.
template <int Bits>
struct Tables {
    static constexpr int kLow = Bits == 8 ? 4 : Bits;
    __m512i low, high;  // bfloat16; `high` of the upper half of 8 bits
    __m512 wide;        // float32
    __m512 zero;

    explicit Tables(int zero) {
        alignas(64) bf16 lows[32], highs[32];
        alignas(64) float wides[16];
        for (int i = 0; i < 32; ++i) {
            const int code = i % (1 << kLow);
            lows[i] = to_bf16(static_cast<float>(Bits == 8 ? code : code - zero));
            highs[i] = to_bf16(static_cast<float>(16 * code - zero));
            if (i < 16) wides[i] = static_cast<float>(code - zero);
        }
        low = _mm512_load_si512(lows);
        high = _mm512_load_si512(highs);
        wide = _mm512_load_ps(wides);
        this->zero = _mm512_set1_ps(static_cast<float>(zero));
    }

    // The float32 of the codes in the lowest bits of 32.
    __m512 number(__m512i bits) const {
        if constexpr (Bits == 8)
            return _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(bits, _mm512_set1_epi32(255))), zero);
        else
            return _mm512_permutexvar_ps(bits, wide);
    }
};

// How many pairs of inputs lie in a vector, and how many vectors the pairs of a block run through.
template <int Bits>
constexpr int kEach = Bits == 3 ? 8 : 16 / Bits;
template <int Bits>
constexpr int kRuns = kPairs / kEach<Bits>;

// Run `run` of a tile's words, from which pairs are taken one after the other.
template <int Bits>
struct Words {
    __m512i low, third;

    Words(const std::uint16_t* at, int run) : low(_mm512_loadu_si512(at + run * 32)) {
        if constexpr (Bits == 3) {
            third = _mm512_loadu_si512(at + 64);
            third = run == 0 ? _mm512_slli_epi16(third, 2) : _mm512_srli_epi16(third, 6);
        }
    }

    // The code of pair `i` of the run in the lowest bits of each word.
    __m512i pair(int i) const {
        if constexpr (Bits == 3)
            return _mm512_ternarylogic_epi32(_mm512_set1_epi16(3), _mm512_srli_epi16(low, 2 * i), _mm512_srli_epi16(third, i), 0xCA);
        else
            return _mm512_srli_epi16(low, Bits * i);
    }
};

// Values of both tiles times a pair of inputs of each row. Row by row, so that an input is in a
// register for no longer than it takes.
template <int R>
static inline void add_pair(__m512 (&sums)[R][2], const __m512i (&values)[2], const RowAddresses<R>& x, std::int64_t offset) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        std::int32_t both;
        std::memcpy(&both, x.at(r, offset), 4);
        const __m512bh inputs = (__m512bh)_mm512_set1_epi32(both);
        sums[r][0] = _mm512_dpbf16_ps(sums[r][0], (__m512bh)values[0], inputs);
        sums[r][1] = _mm512_dpbf16_ps(sums[r][1], (__m512bh)values[1], inputs);
    }
}

// The sums of one block of 32 inputs, both tiles of the panel.
template <int Bits, int R>
static inline void add_block(const BFloat16&, __m512 (&sums)[R][2], const Tables<Bits>& tables,
                             const std::uint16_t* codes, const RowAddresses<R>& x, std::int64_t k) {
#pragma GCC unroll 1
    for (int run = 0; run < kRuns<Bits>; ++run) {
        const Words<Bits> words[2] = {{codes, run}, {codes + Bits * 32, run}};
#pragma GCC unroll 8
        for (int i = 0; i < kEach<Bits>; ++i) {
            const std::int64_t offset = 2 * k + 4 * (run * kEach<Bits> + i);
            const __m512i bits[2] = {words[0].pair(i), words[1].pair(i)};
            add_pair<R>(sums, {_mm512_permutexvar_epi16(bits[0], tables.low), _mm512_permutexvar_epi16(bits[1], tables.low)}, x, offset);
            if constexpr (Bits == 8) {
                const __m512i upper[2] = {_mm512_srli_epi16(bits[0], 4), _mm512_srli_epi16(bits[1], 4)};
                add_pair<R>(sums, {_mm512_permutexvar_epi16(upper[0], tables.high), _mm512_permutexvar_epi16(upper[1], tables.high)}, x, offset);
            }
        }
    }
}

template <int R>
static inline void add_one(__m512 (&sums)[R][2], __m512 first, __m512 second, const RowAddresses<R>& x, std::int64_t offset) {
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
        const __m512 input = _mm512_set1_ps(Float32::number(x.at(r, offset)));
        sums[r][0] = _mm512_fmadd_ps(first, input, sums[r][0]);
        sums[r][1] = _mm512_fmadd_ps(second, input, sums[r][1]);
    }
}

template <int Bits, int R>
static inline void add_block(const Float32&, __m512 (&sums)[R][2], const Tables<Bits>& tables,
                             const std::uint16_t* codes, const RowAddresses<R>& x, std::int64_t k) {
#pragma GCC unroll 1
    for (int run = 0; run < kRuns<Bits>; ++run) {
        const Words<Bits> words[2] = {{codes, run}, {codes + Bits * 32, run}};
#pragma GCC unroll 8
        for (int i = 0; i < kEach<Bits>; ++i) {
            const std::int64_t offset = 4 * k + 8 * (run * kEach<Bits> + i);
            const __m512i even[2] = {words[0].pair(i), words[1].pair(i)};
            const __m512i odd[2] = {_mm512_srli_epi32(even[0], 16), _mm512_srli_epi32(even[1], 16)};
            add_one<R>(sums, tables.number(even[0]), tables.number(even[1]), x, offset);
            add_one<R>(sums, tables.number(odd[0]), tables.number(odd[1]), x, offset + 4);
        }
    }
}

#else

template <int Bits>
struct Tables {
    float zero;
    explicit Tables(int given) : zero(static_cast<float>(given)) {}
};

// The bits of pair `i`: of a word in the lower half of a lane the even input's, in the upper the
// odd one's.
template <int Bits>
static inline vu pair_bits(const std::uint16_t* at, int i) {
    const auto vector = [at](int number) { return load<vu>(at + number * 32); };
    if constexpr (Bits == 3) {
        const vu third = (vector(2) >> i) & 0x00010001u;
        return ((vector(i / 8) >> (2 * (i % 8))) & 0x00030003u) | third << 2;
    } else {
        constexpr int kEach = 16 / Bits;
        constexpr std::uint32_t kMask = (1u << Bits) - 1;
        return (vector(i / kEach) >> (Bits * (i % kEach))) & (kMask | kMask << 16);
    }
}

static inline vf to_floats(vu codes) { return __builtin_convertvector((vi)codes, vf); }

template <class T, int Bits, int R, int V>
static inline void add_block(const T&, vf (&sums)[R][V], const Tables<Bits>& tables, const std::uint16_t* codes,
                             int first, const RowAddresses<R>& x, std::int64_t k) {
    for (int i = 0; i < kPairs; ++i)
        for (int v = 0; v < V; ++v) {
            // Lanes of a vector of 16 outputs, of which this one holds a part.
            const int output = (first + v) * kLanes;
            const vu both = pair_bits<Bits>(codes + output / 16 * Bits * 32 + output % 16 * 2, i);
            const vf even = to_floats(both & 0xFFFFu) - tables.zero, odd = to_floats(both >> 16) - tables.zero;
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                const float x0 = T::number(x.at(r, (k + 2 * i) * T::kSize));
                const float x1 = T::number(x.at(r, (k + 2 * i + 1) * T::kSize));
                sums[r][v] += even * x0;
                sums[r][v] += odd * x1;
            }
        }
}

#endif

#include "../tile_groups.h"

// A chunk of R rows over a slice: each group summed by itself, then scaled.
template <class T, int Bits, int R, int V>
static inline void chunk(const GroupsArgs& args, const Place& place, const Tables<Bits>& tables, int first) {
    const std::int64_t stride = args.x_stride * T::kSize, row = place.row0 + place.row;
    const RowAddresses<R> x(static_cast<const char*>(args.x) + row * stride, stride);
    const std::int64_t groups = args.k / args.group, words = 2 * Bits * 32;
    const std::uint16_t* codes = args.codes + (place.panel * args.k + place.begin) / kBlock * words;
    for (std::int64_t k = place.begin; k < place.end; k += args.group) {
        vf sums[R][V] = {};
        for (std::int64_t in = 0; in < args.group; in += kBlock, codes += words) {
            for (int line = 0; line < 2 * Bits; ++line) prefetch<R>(codes + line * 32 + kAhead / 2);
#if defined(__AVX512BF16__)
            add_block<Bits, R>(T{}, reinterpret_cast<__m512(&)[R][2]>(sums), tables, codes, x, k + in);
#else
            add_block<T, Bits, R, V>(T{}, sums, tables, codes, first, x, k + in);
#endif
        }
        const std::int64_t group = k / args.group;
        for (int v = 0; v < V; ++v) {
            const std::int64_t at = (place.panel * groups + group) * kPanel + (first + v) * kLanes;
            const vf scale = load_as(args.scales, at, args.scale_type);
            vf shift = {};
            if (args.zeros != nullptr) {
                typedef std::uint8_t vb __attribute__((vector_size(kLanes)));
                shift = __builtin_convertvector(load<vb>(args.zeros + at), vf) - static_cast<float>(args.zero);
            }
#pragma GCC unroll 12
            for (int r = 0; r < R; ++r) {
                vf sum = sums[r][v];
                if (args.zeros != nullptr) sum -= shift * args.sums[(row + r) * groups + group];
                float* kept = place.sums[place.row + r] + (first + v) * kLanes;
                store(kept, load<vf>(kept) + sum * scale);
            }
        }
    }
}

template <class T, int Bits>
static inline void panel_of(const GroupsArgs& args, const Tables<Bits>& tables, std::int64_t panel,
                            std::int64_t row0, std::int64_t rows) {
    alignas(64) float sums[kBlockRows][kPanel];
    std::memset(sums, 0, sizeof(float) * kPanel * rows);
    std::int64_t step = rows <= kMost ? args.k : kSlice / args.group * args.group;
    if (step < args.group) step = args.group;
    for (std::int64_t k = 0; k < args.k; k += step) {
        const std::int64_t end = k + step < args.k ? k + step : args.k;
        for_few_chunks(rows, [&](auto count, std::int64_t row) {
            const Place place{row0, row, panel, k, end, sums};
            for (int v = 0; v < kVectors; v += kWide)
                chunk<T, Bits, decltype(count)::value, kWide>(args, place, tables, v);
        });
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        vf whole[kVectors];
        for (int v = 0; v < kVectors; ++v) whole[v] = load<vf>(sums[row] + v * kLanes);
        put(args, row0 + row, panel * kPanel, whole);
    }
}

template <class T, int Bits>
static void product(const GroupsArgs& args, std::int64_t part, std::int64_t parts) {
    const Tables<Bits> tables(args.zero);
    for_panels(rows_of(args), args.n, args.k * T::kSize, part, parts,
               [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
                   panel_of<T, Bits>(args, tables, panel, row0, rows);
               });
}

#if defined(__AMX_TILE__)
static void tiled_by_bits(const GroupsArgs& args, std::int64_t part, std::int64_t parts) {
    switch (args.bits) {
        case 2: return tiled_product<2>(args, part, parts);
        case 3: return tiled_product<3>(args, part, parts);
        case 4: return tiled_product<4>(args, part, parts);
        case 8: return tiled_product<8>(args, part, parts);
    }
}
#endif

template <class T>
static void by_bits(const GroupsArgs& args, std::int64_t part, std::int64_t parts) {
    switch (args.bits) {
        case 2: return product<T, 2>(args, part, parts);
        case 3: return product<T, 3>(args, part, parts);
        case 4: return product<T, 4>(args, part, parts);
        case 8: return product<T, 8>(args, part, parts);
    }
}

static void linear_groups(const void* raw, std::int64_t part, std::int64_t parts) {
    const GroupsArgs& args = *static_cast<const GroupsArgs*>(raw);
#if defined(__AMX_TILE__)
    if (args.x_type == kBFloat16) return tiled_by_bits(args, part, parts);
#endif
    return args.x_type == kFloat32 ? by_bits<Float32>(args, part, parts) : by_bits<BFloat16>(args, part, parts);
}

static void group_sums(const void* raw, std::int64_t part, std::int64_t parts) {
    const GroupSumsArgs& args = *static_cast<const GroupSumsArgs*>(raw);
    const std::int64_t groups = args.k / args.group;
    const Share share(rows_of(args) * groups, 1, part, parts);
    for (std::int64_t i = share.begin; i < share.end; ++i) {
        const std::int64_t at = i / groups * args.x_stride + i % groups * args.group;
        vf sums = {};
        for (std::int64_t k = 0; k < args.group; k += kLanes) sums += load_as(args.x, at + k, args.x_type);
        float total = 0;
        for (int lane = 0; lane < kLanes; ++lane) total += sums[lane];
        args.sums[i] = total;
    }
}

extern const Entry groups_ops[] = {
    {"linear_groups", linear_groups, sizeof(GroupsArgs)},
    {"group_sums", group_sums, sizeof(GroupSumsArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
