// Attention of few queries over keys and values in bfloat16, by the instruction that multiplies
// pairs of them: queries and weights are rounded to bfloat16, sums are float32. Included by
// ops/attention.cpp.
//
// Keys and values lie token by token, as they are written: sums of scores cost some shuffles to a
// token and head, which a layout made for the instruction would spare.
#if defined(__AVX512BF16__)

constexpr int64_t kPairs = 32;  // numbers of a register

static inline vf add_pairs(vf sum, __m512i a, __m512i b) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

static inline vf low_words(vf a, vf b) { return (vf)_mm512_unpacklo_ps((__m512)a, (__m512)b); }
static inline vf high_words(vf a, vf b) { return (vf)_mm512_unpackhi_ps((__m512)a, (__m512)b); }
static inline vf low_pairs(vf a, vf b) { return (vf)_mm512_unpacklo_pd((__m512d)a, (__m512d)b); }
static inline vf high_pairs(vf a, vf b) { return (vf)_mm512_unpackhi_pd((__m512d)a, (__m512d)b); }
template <int Which>
static inline vf quarters(vf a, vf b) { return (vf)_mm512_shuffle_f32x4((__m512)a, (__m512)b, Which); }

// In each quarter the sums, within that quarter, of four vectors.
static inline vf sums_by_quarter(const vf* v) {
    const vf ab = low_words(v[0], v[1]) + high_words(v[0], v[1]);
    const vf cd = low_words(v[2], v[3]) + high_words(v[2], v[3]);
    return low_pairs(ab, cd) + high_pairs(ab, cd);
}

// The sums of the quarters of four such, side by side.
static inline vf sums_of_quarters(const vf* v) {
    const vf ab = quarters<0x88>(v[0], v[1]) + quarters<0xDD>(v[0], v[1]);
    const vf cd = quarters<0x88>(v[2], v[3]) + quarters<0xDD>(v[2], v[3]);
    return quarters<0x88>(ab, cd) + quarters<0xDD>(ab, cd);
}

// Loops that are unrolled keep their sums in registers; the compiler would not do so unasked.

// s[g][t] = q[g] . keys[t]; keys are padded to a multiple of 16. `blocks` registers make a row, of
// which B, if it is not 0, is the number. Of the tokens `ahead`, `bytes` each are fetched.
template <int G, int B>
static inline void dot_pairs(const bf16* q, const char* const* keys, const char* const* ahead,
                             int64_t bytes, int64_t tokens, int64_t blocks, float* s) {
    const int64_t count = B ? B : blocks;
    for (int64_t t = 0; t < tokens; t += 16) {
        vf by_four[G][4];
#pragma GCC unroll 4
        for (int four = 0; four < 4; four++) {
            vf total[G][4] = {};
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const char* row = keys[t + 4 * four + j];
                if (ahead)
                    for (int64_t b = 0; b < bytes; b += 64)
                        __builtin_prefetch(ahead[t + 4 * four + j] + b, 0, 2);
#pragma GCC unroll 4
                for (int64_t b = 0; b < count; b++) {
                    const __m512i k = _mm512_loadu_si512(row + b * 64);
#pragma GCC unroll 4
                    for (int g = 0; g < G; g++)
                        total[g][j] = add_pairs(
                            total[g][j], k, _mm512_loadu_si512(q + (g * count + b) * kPairs));
                }
            }
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) by_four[g][four] = sums_by_quarter(total[g]);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) store(s + g * TOKENS + t, sums_of_quarters(by_four[g]));
    }
}

// out[g] += sum over t of p[g][t] * values[t] of N registers of numbers, in pairs' order; tokens
// are even in number.
template <int G, int N>
static inline void mix_pairs(const bf16* p, const char* const* values, int64_t tokens,
                             int64_t offset, float* out, int64_t stride) {
    vf low[G][N] = {}, high[G][N] = {};
    for (int64_t t = 0; t < tokens; t += 2) {
        __m512i weights[G];
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            std::int32_t both;
            std::memcpy(&both, p + g * TOKENS + t, 4);
            weights[g] = _mm512_set1_epi32(both);
        }
#pragma GCC unroll 4
        for (int b = 0; b < N; b++) {
            const __m512i x = _mm512_loadu_si512(values[t] + offset + b * 64);
            const __m512i y = _mm512_loadu_si512(values[t + 1] + offset + b * 64);
            const __m512i lower = _mm512_unpacklo_epi16(x, y), upper = _mm512_unpackhi_epi16(x, y);
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) {
                low[g][b] = add_pairs(low[g][b], lower, weights[g]);
                high[g][b] = add_pairs(high[g][b], upper, weights[g]);
            }
        }
    }
#pragma GCC unroll 4
    for (int g = 0; g < G; g++)
#pragma GCC unroll 4
        for (int b = 0; b < N; b++) {
            float* to = out + g * stride + offset / 2 + b * kPairs;
            const __m512 l = (__m512)low[g][b], h = (__m512)high[g][b];
            store(to, load<vf>(to) + (vf)_mm512_shuffle_ps(l, h, 0x88));
            store(to + W, load<vf>(to + W) + (vf)_mm512_shuffle_ps(l, h, 0xDD));
        }
}

// As `piece`, for heads of a multiple of 32 numbers. Where tokens are odd in number, one more value
// must be there; it counts for nothing.
template <int G>
static void piece_pairs(const AttendArgs& a, const bf16* q, const Tile& tile, bool first,
                        float* most, float* weight, float* out, int64_t stride) {
    alignas(64) float s[G * TOKENS];
    alignas(64) bf16 p[G * TOKENS];
    const int64_t blocks = a.head_dim / kPairs, tokens = tile.tokens;
    const char* const* ahead = tile.next ? tile.ahead : nullptr;
    const int64_t bytes = 2 * a.row_bytes;
    if (blocks == 2)
        dot_pairs<G, 2>(q, tile.keys, ahead, bytes, tokens, blocks, s);
    else if (blocks == 4)
        dot_pairs<G, 4>(q, tile.keys, ahead, bytes, tokens, blocks, s);
    else
        dot_pairs<G, 0>(q, tile.keys, ahead, bytes, tokens, blocks, s);
#pragma GCC unroll 4
    for (int g = 0; g < G; g++) {
        float* own = s + g * TOKENS;
        settle(a, own, tokens, first, most[g], weight[g], out + g * stride, stride);
        for (int64_t t = 0; t < tokens; t += W)
            store(p + g * TOKENS + t, narrow_fast(load<vf>(own + t)));
    }
    int64_t b = 0;
    for (; b + 2 <= blocks; b += 2)
        mix_pairs<G, 2>(p, tile.values, tokens, b * 64, out, stride);
    for (; b < blocks; b++) mix_pairs<G, 1>(p, tile.values, tokens, b * 64, out, stride);
}

#endif
