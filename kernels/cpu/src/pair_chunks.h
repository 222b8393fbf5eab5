// Attention of many queries of one request over keys and values in bfloat16, by instructions that
// multiply pairs of them. Queries and weights are rounded to bfloat16; scores, sums and what is
// mixed are float32. Included by ops/attention.cpp.
//
// All is done the other way round, a query and head to a lane: scores are keys, as they lie, times
// a panel of queries; what is mixed is values, turned once for all queries, times a panel of
// weights. So a maximum or a sum over tokens is one of whole vectors.
#if defined(__AVX512BF16__)

// Queries times heads that are taken together: at most so many, and so many numbers of them.
constexpr int64_t kMostLanes = 192, kMostMixed = 32768;
// Tokens at a time, and of a request's queries times heads, from how many on chunks are large.
constexpr int64_t kSpan = 128, kManyLanes = 1024;
// Lanes of a panel, and pairs between the rows of tokens or of numbers: an odd number of lines.
constexpr int64_t kLanesTogether = 32;
constexpr int64_t kSpanStride = kSpan + kPairs, kPanels = kMostLanes / kLanesTogether;
// Less than any score, and what two of are alike far from.
constexpr float kLowest = -1e30f;

struct PairSpace {
    alignas(64) bf16 queries[kMostMixed];  // [panels, head_dim / 2, 32, 2]
    alignas(64) float mixed[kMostMixed];   // [panels, head_dim, 32]
    alignas(64) bf16 keys[kSpan * (MOST_DIM + kPairs)];
    alignas(64) bf16 values[MOST_DIM * kSpanStride];  // [head_dim, tokens]
    alignas(64) float scores[kSpan][kLanesTogether];
    alignas(64) std::int32_t weights[kSpan / 2][kLanesTogether];  // pairs of tokens
    alignas(64) std::int32_t positions[kMostLanes], firsts[kMostLanes];
    alignas(64) float most[kMostLanes], weight[kMostLanes];
};

static inline bool in_pairs(const AttendArgs& a) {
    return a.kind == BFLOAT16 && a.head_dim % kPairs == 0;
}

static inline int64_t lanes_of_chunk(const AttendArgs& a, int64_t rows) {
    if (rows * (a.heads / a.kv_heads) < kManyLanes) return kMostVectors;
    const int64_t held = kMostMixed / a.head_dim / kLanesTogether * kLanesTogether;
    return held < kMostLanes ? held : kMostLanes;
}

// y[r] (+)= x[r] . w for `rows` rows of x, a multiple of 32, of `bytes` bytes, a multiple of 64,
// and the 32 lanes of a panel w.
static inline void multiply_pairs(const bf16* x, int64_t x_stride, int64_t rows, int64_t bytes,
                                  const void* w, float* y, bool adds) {
    const char* from = reinterpret_cast<const char*>(x);
#if defined(__AMX_TILE__)
    stores_are_done();
    for (int64_t r = 0; r < rows; r += 2 * kTileRows, y += 2 * kTileRows * kPanel) {
        if (adds)
            load_sums<true>(y);
        else
            clear_sums<true>();
        const char* row = from + r * 2 * x_stride;
        for (int64_t b = 0; b < bytes; b += kTileBytes)
            add_step<BFloat16Tiles, true>(row + b, 2 * x_stride,
                                          static_cast<const char*>(w) + b / 4 * kUnitBytes);
        keep_sums<true>(y);
    }
#else
    constexpr int R = 8;
    for (int64_t r = 0; r < rows; r += R, y += R * kLanesTogether) {
        const char* row = from + r * 2 * x_stride;
        vf total[R][2];
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
            for (int v = 0; v < 2; v++)
                total[i][v] = adds ? load<vf>(y + i * kLanesTogether + v * W) : vf{};
        for (int64_t b = 0; b < bytes; b += 4) {
            const char* unit = static_cast<const char*>(w) + b * kLanesTogether;
            const __m512i low = _mm512_loadu_si512(unit), high = _mm512_loadu_si512(unit + 64);
#pragma GCC unroll 8
            for (int i = 0; i < R; i++) {
                std::int32_t both;
                std::memcpy(&both, row + i * 2 * x_stride + b, 4);
                total[i][0] = add_pairs(total[i][0], low, _mm512_set1_epi32(both));
                total[i][1] = add_pairs(total[i][1], high, _mm512_set1_epi32(both));
            }
        }
#pragma GCC unroll 8
        for (int i = 0; i < R; i++)
            for (int v = 0; v < 2; v++) store(y + i * kLanesTogether + v * W, total[i][v]);
    }
#endif
}

// 32 numbers rounded, in their order.
static inline __m512i rounded_pair(vf low, vf high) {
    return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
}

// Queries become panels: lane by lane what is read row by row. Lanes that are not there are zero.
static inline void lay_queries(const AttendArgs& a, const Chunk& c, int64_t lanes, PairSpace& s) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim, each = a.heads + 2 * a.kv_heads;
    for (int64_t lane = 0; lane < lanes; lane += W)
        for (int64_t i = 0; i < n; i += kPairs) {
            vf held[W];
            for (int64_t j = 0; j < W; j++) {
                held[j] = vf{};
                const int64_t l = lane + j, row = c.begin + l / group;
                if (row >= c.end) continue;
                const float* from = a.qkv + (row * each + c.kv * group + l % group) * n + i;
                held[j] = (vf)rounded_pair(load<vf>(from), load<vf>(from + W));
            }
            transpose(held);
            float* to = reinterpret_cast<float*>(s.queries) + lane / kLanesTogether * n / 2 * kLanesTogether;
            for (int64_t j = 0; j < W; j++)
                store(to + (i / 2 + j) * kLanesTogether + lane % kLanesTogether, held[j]);
        }
}

// Keys as they lie, and values turned: pairs of tokens side by side, beyond `tokens` zeros.
static inline void lay_tokens(const AttendArgs& a, const Chunk& c, int64_t from, int64_t tokens,
                              PairSpace& s) {
    const char *keys[kSpan], *values[kSpan];
    const int64_t n = a.head_dim;
    find_rows(a, c.begin, c.kv, from, from + tokens, keys, values);
    for (int64_t t = 0; t < tokens; t++) std::memcpy(s.keys + t * (n + kPairs), keys[t], 2 * n);
    alignas(64) std::uint16_t lower[32], upper[32];
    for (int i = 0; i < 32; i++) {
        lower[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 32);
        upper[i] = static_cast<std::uint16_t>(lower[i] + 16);
    }
    const __m512i low_half = _mm512_load_si512(lower), high_half = _mm512_load_si512(upper);
    for (int64_t t = 0; t < tokens; t += 2 * W)
        for (int64_t i = 0; i < n; i += kPairs) {
            vf low[W], high[W];
            for (int64_t j = 0; j < W; j++) {
                const int64_t at = t + 2 * j;
                const __m512i none = _mm512_setzero_si512();
                const __m512i x = at < tokens ? _mm512_loadu_si512(values[at] + 2 * i) : none;
                const __m512i y = at + 1 < tokens ? _mm512_loadu_si512(values[at + 1] + 2 * i) : none;
                low[j] = (vf)_mm512_permutex2var_epi16(x, low_half, y);
                high[j] = (vf)_mm512_permutex2var_epi16(x, high_half, y);
            }
            transpose(low);
            transpose(high);
            for (int64_t j = 0; j < W; j++) {
                store(s.values + (i + j) * kSpanStride + t, low[j]);
                store(s.values + (i + W + j) * kSpanStride + t, high[j]);
            }
        }
}

// 2^x within 3e-6 of itself; 0 far below.
static inline vf power_of_two(vf x) {
    const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    const vf r = x - (vf)n;
    vf p = splat(9.58279e-3f) * r + 5.590641e-2f;
    p = p * r + 2.40241e-1f;
    p = p * r + 6.931242e-1f;
    p = p * r + 1.0f;
    return (vf)_mm512_scalef_ps((__m512)p, n);
}

// What scores are multiplied with before they are exponents of 2.
struct Scaling {
    float by, within, cap;

    explicit Scaling(const AttendArgs& a) : by(a.scale * 1.44269504f), within(0), cap(0) {
        if (a.cap == 0) return;
        within = a.scale / a.cap;
        cap = a.cap * 1.44269504f;
    }
    vf of(vf x) const { return cap == 0 ? x * by : cap * hyperbolic_tangent(x * within); }
};

// Scores of `tokens` tokens from `from` on become weights of 16 lanes, in pairs, those that a lane
// does not see 0. Returns by how much what was found before fades.
template <bool Whole>
static inline vf weigh_lanes(const Scaling& scaling, PairSpace& s, int64_t lane, int64_t from, int64_t tokens) {
    const int64_t column = lane % kLanesTogether;
    const vi last = load<vi>(s.positions + lane) - (std::int32_t)from;
    const vi first = load<vi>(s.firsts + lane) - (std::int32_t)from;
    const auto seen = [&](int64_t t) {
        return ((vi{} + (std::int32_t)t) <= last) & ((vi{} + (std::int32_t)t) >= first);
    };
    const vf before = load<vf>(s.most + lane);
    vf most = before;
    for (int64_t t = 0; t < tokens; t++) {
        vf x = scaling.of(load<vf>(&s.scores[t][column]));
        if (!Whole) x = select(seen(t), x, splat(kLowest));
        store(&s.scores[t][column], x);
        most = (vf)_mm512_max_ps((__m512)x, (__m512)most);
    }
    alignas(64) std::uint16_t by_turns[32];
    for (int i = 0; i < 32; i++) by_turns[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * 16);
    const __m512i turns = _mm512_load_si512(by_turns);
    vf total{};
    for (int64_t t = 0; t < tokens; t += 2) {
        vf low = power_of_two(load<vf>(&s.scores[t][column]) - most);
        vf high = power_of_two(load<vf>(&s.scores[t + 1][column]) - most);
        if (!Whole) low = select(seen(t), low, vf{}), high = select(seen(t + 1), high, vf{});
        total += low + high;
        _mm512_storeu_si512(&s.weights[t / 2][column], _mm512_permutexvar_epi16(turns, rounded_pair(low, high)));
    }
    const vf faded = power_of_two(before - most);
    store(s.most + lane, most);
    store(s.weight + lane, load<vf>(s.weight + lane) * faded + total);
    return faded;
}

// One panel's lanes over the tokens that are laid out.
static inline void mix_panel(const AttendArgs& a, const Scaling& scaling, int64_t panel, int64_t from,
                             int64_t tokens, PairSpace& s) {
    const int64_t n = a.head_dim, lane = panel * kLanesTogether;
    int64_t last = s.positions[lane], lowest = last, first = s.firsts[lane], highest = first;
    for (int64_t l = lane + 1; l < lane + kLanesTogether; l++) {
        last = s.positions[l] > last ? s.positions[l] : last;
        lowest = s.positions[l] < lowest ? s.positions[l] : lowest;
        first = s.firsts[l] < first ? s.firsts[l] : first;
        highest = s.firsts[l] > highest ? s.firsts[l] : highest;
    }
    if (last + 1 - from < tokens) tokens = last + 1 - from;
    if (tokens <= 0 || from + tokens <= first) return;
    const int64_t padded = (tokens + 31) / 32 * 32;
    const bool whole = from >= highest && from + padded <= lowest + 1;
    multiply_pairs(s.keys, n + kPairs, padded, 2 * n, s.queries + panel * n * kLanesTogether, s.scores[0], false);
    float* mixed = s.mixed + panel * n * kLanesTogether;
    for (int64_t half = 0; half < kLanesTogether; half += W) {
        const vf faded = whole ? weigh_lanes<true>(scaling, s, lane + half, from, padded)
                               : weigh_lanes<false>(scaling, s, lane + half, from, padded);
        if (_mm512_cmp_ps_mask((__m512)faded, _mm512_set1_ps(1), _CMP_NEQ_UQ) == 0) continue;
        for (int64_t i = 0; i < n; i++) {
            float* own = mixed + i * kLanesTogether + half;
            store(own, load<vf>(own) * faded);
        }
    }
    multiply_pairs(s.values, kSpanStride, n, 2 * padded, s.weights, mixed, true);
}

// What was mixed, a row to each query and head again.
static inline void finish_lanes(const AttendArgs& a, const Chunk& c, int64_t lanes, const PairSpace& s) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim;
    for (int64_t lane = 0; lane < lanes; lane += W) {
        const float* mixed = s.mixed + lane / kLanesTogether * n * kLanesTogether + lane % kLanesTogether;
        for (int64_t i = 0; i < n; i += W) {
            vf held[W];
            for (int64_t j = 0; j < W; j++) held[j] = load<vf>(mixed + (i + j) * kLanesTogether);
            transpose(held);
            for (int64_t j = 0; j < W && c.begin + (lane + j) / group < c.end; j++) {
                const int64_t row = c.begin + (lane + j) / group, head = c.kv * group + (lane + j) % group;
                const vf found = held[j] * (1.0f / s.weight[lane + j]);
                store(a.out + (row * a.heads + head) * n + i, found);
                if (a.rounded) store(a.rounded + row * a.rounded_stride + head * n + i, narrow(found));
            }
        }
    }
}

static void attend_pairs(const AttendArgs& a, const Chunk& c) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim;
    const int64_t panels = ((c.end - c.begin) * group + kLanesTogether - 1) / kLanesTogether;
    const int64_t lanes = panels * kLanesTogether;
    PairSpace s;
#if defined(__AMX_TILE__)
    Tiles tiles;
    tiles.shape(2 * kTileRows);
#endif
    for (int64_t l = 0; l < lanes; l++) {
        // Lanes that are not there see what the last one sees.
        const int64_t row = c.begin + l / group < c.end ? c.begin + l / group : c.end - 1;
        const int64_t position = a.positions[row];
        s.positions[l] = (std::int32_t)position;
        s.firsts[l] = a.window && position + 1 > a.window ? (std::int32_t)(position + 1 - a.window) : 0;
        s.most[l] = kLowest, s.weight[l] = 0;
    }
    lay_queries(a, c, lanes, s);
    std::memset(s.mixed, 0, lanes * n * 4);
    const Scaling scaling(a);
    const int64_t end = a.positions[c.end - 1] + 1;
    for (int64_t from = s.firsts[0]; from < end; from += kSpan) {
        const int64_t tokens = end - from < kSpan ? end - from : kSpan;
        lay_tokens(a, c, from, tokens, s);
        for (int64_t panel = 0; panel < panels; panel++) mix_panel(a, scaling, panel, from, tokens, s);
    }
    finish_lanes(a, c, lanes, s);
}

#endif
