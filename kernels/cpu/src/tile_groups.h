// Products of bfloat16 inputs with integer weights in groups, by tiles: codes less their zeros,
// which are exact in bfloat16, become tiles of weights in the cache, once for all rows; a group's
// sums leave their tiles to be scaled. Included by ops/groups.cpp.
#if defined(__AMX_TILE__)

// Inputs whose tiles are laid out at a time: whole groups, or a part of one.
constexpr std::int64_t kLaidOut = 512;
// Rows that are taken together: their sums are kept beside the tiles.
constexpr std::int64_t kTiledRows = 512;

struct GroupSpace {
    alignas(64) char weights[kLaidOut / kBlock * kStepBytes];
    alignas(64) float sums[kTiledRows][kPanel];
    TileSums open[kTiledRows / (2 * kTileRows)];  // of a group that is not whole yet, by 32 rows
};

// The values of a pair of inputs of 16 outputs, whose codes are the lowest bits of each word.
template <int Bits>
static inline __m512i values_of(const Tables<Bits>& tables, __m512i bits) {
    if constexpr (Bits != 8) return _mm512_permutexvar_epi16(bits, tables.low);
    const __m512i even = (__m512i)tables.number(bits);
    const __m512i odd = (__m512i)tables.number(_mm512_srli_epi32(bits, 16));
    return _mm512_mask_blend_epi16(0xAAAAAAAAu, _mm512_srli_epi32(even, 16), odd);
}

// A block of 32 inputs as 16 units of a panel.
template <int Bits>
static inline void lay_block(const Tables<Bits>& tables, const std::uint16_t* codes, char* to) {
#pragma GCC unroll 4
    for (int run = 0; run < kRuns<Bits>; ++run) {
        const Words<Bits> words[2] = {{codes, run}, {codes + Bits * 32, run}};
#pragma GCC unroll 8
        for (int i = 0; i < kEach<Bits>; ++i, to += kUnitBytes) {
            _mm512_store_si512(to, values_of<Bits>(tables, words[0].pair(i)));
            _mm512_store_si512(to + kTileBytes, values_of<Bits>(tables, words[1].pair(i)));
        }
    }
}

// A group's sums of some rows, scaled, onto what they are so far.
static inline void add_group(const GroupsArgs& args, std::int64_t panel, std::int64_t group, std::int64_t row,
                             std::int64_t rows, const TileSums& found, float (*sums)[kPanel]) {
    const std::int64_t groups = args.k / args.group, at = (panel * groups + group) * kPanel;
    const vf scale[2] = {load_as(args.scales, at, args.scale_type), load_as(args.scales, at + 16, args.scale_type)};
    if (args.zeros == nullptr) {
        for (std::int64_t r = 0; r < rows; ++r)
            for (int v = 0; v < 2; ++v)
                store(sums[r] + 16 * v, load<vf>(sums[r] + 16 * v) + load<vf>(found.at[r] + 16 * v) * scale[v]);
        return;
    }
    vf shift[2];
    for (int v = 0; v < 2; ++v) {
        const __m128i zeros = _mm_loadu_si128(reinterpret_cast<const __m128i*>(args.zeros + at + 16 * v));
        shift[v] = (vf)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros)) - static_cast<float>(args.zero);
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        const float own = args.sums[(row + r) * groups + group];
        for (int v = 0; v < 2; ++v)
            store(sums[r] + 16 * v, load<vf>(sums[r] + 16 * v) +
                                        (load<vf>(found.at[r] + 16 * v) - shift[v] * own) * scale[v]);
    }
}

// Up to 32 rows over the inputs [begin, end), whose tiles are laid out.
template <bool Two>
static inline void add_inputs(const GroupsArgs& args, GroupSpace& space, std::int64_t panel, std::int64_t begin,
                              std::int64_t end, std::int64_t row0, const TileRows& some, std::int64_t row) {
    const char *x = some.x + begin * 2, *w = space.weights;
    TileSums& found = space.open[row / (2 * kTileRows)];
    for (std::int64_t k = begin; k < end;) {
        if (k % args.group == 0)
            clear_sums<Two>();
        else
            load_sums<Two>(&found);
        const std::int64_t group = k / args.group, last = (group + 1) * args.group;
        for (const std::int64_t stop = last < end ? last : end; k < stop; k += kBlock, x += kTileBytes, w += kStepBytes)
            add_step<BFloat16Tiles, Two>(x, some.stride, w);
        keep_sums<Two>(&found);
        if (k == last) add_group(args, panel, group, row0 + row, some.rows, found, space.sums + row);
    }
}

template <int Bits>
static inline void tiled_panel(const GroupsArgs& args, const Tables<Bits>& tables, Tiles& tiles,
                               GroupSpace& space, std::int64_t panel, std::int64_t row0, std::int64_t rows) {
    const std::int64_t words = 2 * Bits * 32, stride = args.x_stride * 2;
    const std::int64_t whole_groups = kLaidOut / args.group * args.group;
    const std::uint16_t* codes = args.codes + panel * args.k / kBlock * words;
    std::memset(space.sums, 0, sizeof(float) * kPanel * rows);
    for (std::int64_t begin = 0, end = 0; begin < args.k; begin = end) {
        // Of a group that is larger, no further than to its end.
        const std::int64_t border = whole_groups ? args.k : (begin / args.group + 1) * args.group;
        end = begin + (whole_groups ? whole_groups : kLaidOut);
        if (end > border) end = border;
        char* laid = space.weights;
        for (std::int64_t k = begin; k < end; k += kBlock, codes += words, laid += kStepBytes) {
            for (int line = 0; line < 2 * Bits; ++line) prefetch<1>(codes + line * 32 + kAhead / 4);
            lay_block<Bits>(tables, codes, laid);
        }
        stores_are_done();
        for_tiles(tiles, static_cast<const char*>(args.x) + row0 * stride, stride, rows,
                  [&](const TileRows& some, std::int64_t row) {
                      if (some.rows > kTileRows)
                          add_inputs<true>(args, space, panel, begin, end, row0, some, row);
                      else
                          add_inputs<false>(args, space, panel, begin, end, row0, some, row);
                  });
    }
    for (std::int64_t row = 0; row < rows; ++row) {
        const vf whole[2] = {load<vf>(space.sums[row]), load<vf>(space.sums[row] + 16)};
        put(args, row0 + row, panel * kPanel, whole);
    }
}

template <int Bits>
static void tiled_product(const GroupsArgs& args, std::int64_t part, std::int64_t parts) {
    const Tables<Bits> tables(args.zero);
    Tiles tiles;
    GroupSpace space;
    const std::int64_t m = rows_of(args), size = tiled_rows(m, args.k * 2);
    for_blocks(m, args.n, size < kTiledRows ? size : kTiledRows, part, parts,
               [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
                   tiled_panel<Bits>(args, tables, tiles, space, panel, row0, rows);
               });
}

#endif
