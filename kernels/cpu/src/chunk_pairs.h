// Attention of many queries of one request over keys and values in bfloat16, by instructions that
// multiply pairs of them, or by tiles: queries and weights are rounded to bfloat16, sums are
// float32. Included by ops/attention.cpp.
#if defined(__AVX512BF16__)

constexpr int64_t kMostWords = MOST_DIM / 2;

// What a chunk works on; a row of each belongs to a query and a head. Words are pairs of bfloat16.
struct PairSpace {
    alignas(64) bf16 q[kMostVectors * MOST_DIM];
    alignas(64) float out[kMostVectors * MOST_DIM];
    alignas(64) float keys[kMostWords * kTile];          // words [head_dim / 2, tokens]
    alignas(64) float values[kTile / 2 * MOST_DIM];      // words [tokens / 2, head_dim]
    alignas(64) float scores[kMostVectors * kTile];
    alignas(64) bf16 weights[kMostVectors * kTile];
    float most[kMostVectors], weight[kMostVectors];
};

// c[m][n] (+)= a[m] . b[n] for 16 rows and 32 columns, of words.
static inline void multiply_words(const char* a, int64_t a_stride, const char* b, int64_t b_stride,
                                  char* c, int64_t c_stride, int64_t words, bool adds) {
    constexpr int R = 8;
    for (int half = 0; half < 16; half += R, a += R * a_stride, c += R * c_stride) {
        vf total[R][2];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++)
                total[r][v] = adds ? load<vf>(c + r * c_stride + v * 64) : vf{};
        for (int64_t word = 0; word < words; word++) {
            const __m512i low = _mm512_loadu_si512(b + word * b_stride);
            const __m512i high = _mm512_loadu_si512(b + word * b_stride + 64);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                int32_t both;
                std::memcpy(&both, a + r * a_stride + word * 4, 4);
                const __m512i x = _mm512_set1_epi32(both);
                total[r][0] = add_pairs(total[r][0], x, low);
                total[r][1] = add_pairs(total[r][1], x, high);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int v = 0; v < 2; v++) store(c + r * c_stride + v * 64, total[r][v]);
    }
}

// The same for rows that are a multiple of 16, columns of 32, and words of 16.
static inline void multiply_pairs(const bf16* a, int64_t a_stride, int64_t rows, const float* b,
                                  int64_t columns, float* c, int64_t words, bool adds) {
    for (int64_t n = 0; n < columns; n += 32)
        for (int64_t m = 0; m < rows; m += 16) {
            const char* from = reinterpret_cast<const char*>(a + m * a_stride);
            const char* by = reinterpret_cast<const char*>(b + n);
            char* to = reinterpret_cast<char*>(c + m * columns + n);
#if defined(__AMX_TILE__)
            if (rows - m >= 32) {
                multiply_tiles<TilesOfBFloat16, 2>(from, a_stride * 2, by, columns * 4, to, columns * 4, words, adds);
                m += 16;
            } else {
                multiply_tiles<TilesOfBFloat16, 1>(from, a_stride * 2, by, columns * 4, to, columns * 4, words, adds);
            }
#else
            multiply_words(from, a_stride * 2, by, columns * 4, to, columns * 4, words, adds);
#endif
        }
}

// 16 words of a row of n numbers, from the number i on; zeros behind its end, and for no row.
static inline vf words_of(const char* row, int64_t i, int64_t n) {
    if (row == nullptr || i >= n) return vf{};
    if (i + 32 <= n) return load<vf>(row + i * 2);
    alignas(64) bf16 held[32] = {};
    std::memcpy(held, row + i * 2, (n - i) * 2);
    return load<vf>(held);
}

static inline void lay_out_pairs(const AttendArgs& a, const Chunk& c, int64_t from, int64_t tokens,
                                 PairSpace& s) {
    const char *keys[kTile], *values[kTile];
    const int64_t n = a.head_dim, stride = padded_dim(n);
    find_rows(a, c.begin, c.kv, from, from + tokens, keys, values);
    for (int64_t t = tokens; t < kTile; t++) keys[t] = values[t] = nullptr;
    for (int64_t t = 0; t < kTile; t += 16)
        for (int64_t i = 0; i < stride; i += 32) {
            vf words[16];
            for (int j = 0; j < 16; j++) words[j] = words_of(keys[t + j], i, n);
            transpose(words);
            for (int j = 0; j < 16; j++) store(s.keys + (i / 2 + j) * kTile + t, words[j]);
        }
    for (int64_t t = 0; t < kTile; t += 2)
        for (int64_t i = 0; i < stride; i += 32) {
            const vf first = words_of(values[t], i, n), second = words_of(values[t + 1], i, n);
            vh one[2], other[2];
            std::memcpy(one, &first, sizeof one);
            std::memcpy(other, &second, sizeof other);
            for (int half = 0; half < 2; half++) {
                const vu both = __builtin_convertvector(one[half], vu) |
                                __builtin_convertvector(other[half], vu) << 16;
                store(s.values + t / 2 * stride + i + half * 16, (vf)both);
            }
        }
}

static void attend_pairs(const AttendArgs& a, const Chunk& c) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim, stride = padded_dim(n);
    const int64_t each = a.heads + 2 * a.kv_heads, vectors = (c.end - c.begin) * group;
    const int64_t padded = (vectors + 15) / 16 * 16;
    PairSpace s;
    std::memset(s.q, 0, padded * stride * sizeof(bf16));
    std::memset(s.weights, 0, padded * kTile * sizeof(bf16));
    std::memset(s.out, 0, padded * stride * sizeof(float));
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = c.begin + v / group, head = c.kv * group + v % group;
        round_row(a.qkv + (row * each + head) * n, s.q + v * stride, n);
        s.most[v] = -INFINITY, s.weight[v] = 0;
    }
    const int64_t last = a.positions[c.end - 1] + 1, lowest = a.positions[c.begin] + 1;
    const int64_t first = a.window && lowest > a.window ? lowest - a.window : 0;
#if defined(__AMX_TILE__)
    const Tiles tiles;
#endif
    for (int64_t from = first; from < last; from += kTile) {
        lay_out_pairs(a, c, from, last - from < kTile ? last - from : kTile, s);
        multiply_pairs(s.q, stride, padded, s.keys, kTile, s.scores, stride / 2, false);
        for (int64_t v = 0; v < vectors; v++) {
            weigh_tile(a, a.positions[c.begin + v / group], from, s.scores + v * kTile, s.most + v,
                       s.weight + v, s.out + v * stride, stride);
            round_row(s.scores + v * kTile, s.weights + v * kTile, kTile);
        }
        multiply_pairs(s.weights, kTile, padded, s.values, stride, s.out, kTile / 2, true);
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = c.begin + v / group, head = c.kv * group + v % group;
        float* to = a.out + (row * a.heads + head) * n;
        const float by = 1.0f / s.weight[v];
        for (int64_t i = 0; i < n; i++) to[i] = s.out[v * stride + i] * by;
        if (a.rounded) round_row(to, a.rounded + row * a.rounded_stride + head * n, n);
    }
}

#endif
