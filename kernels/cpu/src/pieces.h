// Attention of one row to a piece of its context: scores, their weights, and the values mixed.
// Included by ops/attention.cpp.

// s[g][t] = q[g] . keys[t] for G heads; keys are padded by AHEAD tokens, s to a multiple of W.
// Values are fetched on the way: they are needed next.
template <class Kv, int G>
static inline void dot(const float* q, int64_t stride, const char* const* keys, int64_t to_values,
                       int64_t tokens, int64_t n, float* s) {
    for (int64_t t = 0; t < tokens; t += W) {
        vf held[G][W];
        for (int j = 0; j < W; j++) {
            const char* row = keys[t + j];
            for (int64_t b = 0; b < n * (int64_t)sizeof(typename Kv::T); b += 64) {
                __builtin_prefetch(keys[t + j + AHEAD] + b);
                __builtin_prefetch(row + to_values + b);
            }
            vf total[G] = {};
            for (int64_t i = 0; i < n; i += 2 * W) {
                vf a, b;
                pair_of<Kv>(row, i, n, a, b);
                for (int g = 0; g < G; g++)
                    total[g] += a * load<vf>(q + g * stride + i) + b * load<vf>(q + g * stride + i + W);
            }
            for (int g = 0; g < G; g++) held[g][j] = total[g];
        }
        for (int g = 0; g < G; g++) store(s + g * TOKENS + t, sums(held[g]));
    }
}

// out[g] += sum over t of p[g][t] * values[t], in pairs' order.
template <class Kv, int G>
static inline void mix(const float* p, const char* const* values, int64_t tokens, int64_t n,
                       float* out, int64_t stride) {
    constexpr int WIDE = W == 16 ? 2 : 1;
    for (int64_t i = 0; i < n; i += 2 * W * WIDE) {
        vf total[G][2 * WIDE];
        bool both = WIDE == 2 && i + 2 * W < n;
        for (int g = 0; g < G; g++)
            for (int w = 0; w < 2 * WIDE; w++)
                total[g][w] = w < 2 || both ? load<vf>(out + g * stride + i + w * W) : vf{};
        for (int64_t t = 0; t < tokens; t++) {
            vf v[2 * WIDE] = {};
            pair_of<Kv>(values[t], i, n, v[0], v[1]);
            if constexpr (WIDE == 2)
                if (both) pair_of<Kv>(values[t], i + 2 * W, n, v[2], v[3]);
            for (int g = 0; g < G; g++)
                for (int w = 0; w < 2 * WIDE; w++) total[g][w] += p[g * TOKENS + t] * v[w];
        }
        for (int g = 0; g < G; g++)
            for (int w = 0; w < 2 * WIDE; w++)
                if (w < 2 || both) store(out + g * stride + i + w * W, total[g][w]);
    }
}

// Scores become weights, in place; returns their sum. What is beyond `tokens` is cleared.
static inline float weigh(float* s, int64_t tokens, float scale, float cap, float &most) {
    int64_t padded = (tokens + W - 1) / W * W;
    for (int64_t t = tokens; t < padded; t++) s[t] = s[0];
    vf high = splat(-INFINITY);
    for (int64_t t = 0; t < padded; t += W) {
        vf x = load<vf>(s + t) * scale;
        if (cap != 0) x = cap * hyperbolic_tangent(x / cap);
        store(s + t, x);
        high = larger(x, high);
    }
    float found = largest(high);
    most = found > most ? found : most;
    vf total{};
    for (int64_t t = 0; t < padded; t += W) {
        vf e = exponential(load<vf>(s + t) - most);
        if (t + W > tokens)
            for (int j = 0; j < W; j++)
                if (t + j >= tokens) e[j] = 0;
        store(s + t, e);
        total += e;
    }
    return sum(total);
}

// A head's scores become weights; what was found before fades.
static inline void settle(const AttendArgs &a, float* s, int64_t tokens, bool first, float &most,
                          float &weight, float* out, int64_t stride) {
    const float before = most, found = weigh(s, tokens, a.scale, a.cap, most);
    if (first) {
        weight = found;
        return;
    }
    const vf faded = exponential(splat(before - most));
    weight = weight * faded[0] + found;
    for (int64_t i = 0; i < stride; i += W) store(out + i, load<vf>(out + i) * faded);
}

// Up to TOKENS tokens of one key head, and what is likely to be needed next: where the same share
// goes on, each key head fetches its part of the next tokens; else, the next head's keys.
struct Tile {
    const char *keys[TOKENS + AHEAD], *values[TOKENS + AHEAD], *ahead[TOKENS];
    int64_t tokens;
    bool next;
};

// For G heads of one key head: largest score, sum of weights, weighted values (in pairs' order).
template <class Kv, int G>
static void piece(const AttendArgs &a, const float* q, int64_t stride, const Tile &tile,
                  const float* scales, bool first, float* most, float* weight, float* out) {
    alignas(64) float s[G * TOKENS];
    const int64_t tokens = tile.tokens;
    dot<Kv, G>(q, stride, tile.keys, a.kv_heads * a.row_bytes, tokens, a.head_dim, s);
    for (int g = 0; g < G; g++) {
        float* own = s + g * TOKENS;
        if (scales)
            for (int64_t t = 0; t < tokens; t++) own[t] *= scales[t];
        settle(a, own, tokens, first, most[g], weight[g], out + g * stride, stride);
        if (scales)
            for (int64_t t = 0; t < tokens; t++) own[t] *= scales[TOKENS + t];
    }
    mix<Kv, G>(s, tile.values, tokens, a.head_dim, out, stride);
}

#include "pairs.h"

template <class Kv>
static inline void lay_tile(const AttendArgs &a, int64_t row, int64_t kv, int64_t start, int64_t to,
                            int64_t next_to, Tile &tile) {
    tile.tokens = to - start < TOKENS ? to - start : TOKENS;
    find_rows(a, row, kv, start, start + tile.tokens, tile.keys, tile.values);
    // Beyond the piece stand the next head's keys, which are likely to be needed next.
    for (int64_t t = 0; t < AHEAD; t++) {
        tile.keys[tile.tokens + t] = tile.keys[t < tile.tokens ? t : tile.tokens - 1] + a.row_bytes;
        tile.values[tile.tokens + t] = tile.values[tile.tokens - 1];
    }
    const int64_t after = start + tile.tokens, end = after + TOKENS < next_to ? after + TOKENS : next_to;
    tile.next = after < end;
    if (!tile.next) return;
    const char* values[TOKENS];
    find_rows(a, row, 2 * kv, after, end, tile.ahead, values);
    for (int64_t t = end - after; t < (tile.tokens + 15) / 16 * 16; t++)
        tile.ahead[t] = tile.ahead[end - after - 1];
}

// The query heads of a key head that share a tile, four at a time.
template <class Kv>
static inline void attend_tile(const AttendArgs &a, int64_t row, int64_t kv, const Tile &tile,
                               const float* scales, bool first, float* found) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim, stride = padded_dim(n);
    for (int64_t g = 0; g < group;) {
        const int64_t some = group - g < 4 ? group - g : 4;
        const float* given = a.qkv + (row * (a.heads + 2 * a.kv_heads) + kv * group + g) * n;
        float *most = found + g, *weight = found + group + g;
        float* out = found + 2 * group + g * stride;
        g += some;
#if defined(__AVX512BF16__)
        if constexpr (sizeof(typename Kv::T) == 2)
            if (n % kPairs == 0) {
                alignas(64) bf16 q[4 * MOST_DIM];
                round_row(given, q, some * n);
                switch (some) {
                    case 1: piece_pairs<1>(a, q, tile, first, most, weight, out, stride); break;
                    case 2: piece_pairs<2>(a, q, tile, first, most, weight, out, stride); break;
                    case 3: piece_pairs<3>(a, q, tile, first, most, weight, out, stride); break;
                    default: piece_pairs<4>(a, q, tile, first, most, weight, out, stride);
                }
                continue;
            }
#endif
        alignas(64) float q[4 * MOST_DIM];
        for (int64_t h = 0; h < some; h++) arranged<Kv>(given + h * n, n, q + h * stride);
        switch (some) {
            case 1: piece<Kv, 1>(a, q, stride, tile, scales, first, most, weight, out); break;
            case 2: piece<Kv, 2>(a, q, stride, tile, scales, first, most, weight, out); break;
            case 3: piece<Kv, 3>(a, q, stride, tile, scales, first, most, weight, out); break;
            default: piece<Kv, 4>(a, q, stride, tile, scales, first, most, weight, out);
        }
    }
}

// One piece of one row's context for the query heads [0, group) of a key head; the tokens after it
// are fetched up to `next_to`.
template <class Kv>
static void attend_piece(const AttendArgs &a, int64_t row, int64_t kv, int64_t from, int64_t to,
                         int64_t next_to, float* found) {
    Tile tile;
    float scales[2 * TOKENS];
    constexpr bool scaled = sizeof(typename Kv::T) == 1;
    for (int64_t start = from; start < to; start += TOKENS) {
        lay_tile<Kv>(a, row, kv, start, to, next_to, tile);
        for (int64_t t = 0; scaled && t < tile.tokens; t++) {
            std::memcpy(scales + t, tile.keys[t] + a.row_bytes - 4, 4);
            std::memcpy(scales + TOKENS + t, tile.values[t] + a.row_bytes - 4, 4);
        }
        attend_tile<Kv>(a, row, kv, tile, scaled ? scales : nullptr, start == from, found);
    }
}
