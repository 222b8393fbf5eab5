// Attention of many queries of one request: keys and values are laid out once for all of them, and
// multiplied block by block. Included by ops/attention.cpp.

// Queries times heads that are taken together, and tokens at a time.
constexpr int64_t kMostVectors = 64, kTile = 64;
// From so many rows on that pays.
constexpr int64_t kChunk = 8;

// c[m][n] (+)= a[m][k] * b[k][n] for M rows and V vectors, in the order of k.
template <int M, int V>
static inline void multiply_block(const float* a, int64_t a_stride, const float* b, int64_t b_stride,
                                  float* c, int64_t c_stride, int64_t depth, bool adds) {
    vf total[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) total[m][v] = adds ? load<vf>(c + m * c_stride + v * W) : vf{};
    for (int64_t k = 0; k < depth; k++) {
        vf own[V];
        for (int v = 0; v < V; v++) own[v] = load<vf>(b + k * b_stride + v * W);
        for (int m = 0; m < M; m++) {
            const float x = a[m * a_stride + k];
            for (int v = 0; v < V; v++) total[m][v] += x * own[v];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) store(c + m * c_stride + v * W, total[m][v]);
}

// The same for any number of rows, and columns that are a multiple of 2 W.
static inline void multiply(const float* a, int64_t a_stride, int64_t rows, const float* b,
                            int64_t b_stride, int64_t columns, float* c, int64_t c_stride,
                            int64_t depth, bool adds) {
    constexpr int M = W == 16 ? 6 : 4, V = W == 16 ? 4 : 2;
    for (int64_t n = 0; n < columns;) {
        const bool wide = n + V * W <= columns;
        int64_t m = 0;
        for (; m + M <= rows; m += M) {
            const float* x = a + m * a_stride;
            float* y = c + m * c_stride + n;
            if (wide)
                multiply_block<M, V>(x, a_stride, b + n, b_stride, y, c_stride, depth, adds);
            else
                multiply_block<M, 2>(x, a_stride, b + n, b_stride, y, c_stride, depth, adds);
        }
        for (; m < rows; m++) {
            const float* x = a + m * a_stride;
            float* y = c + m * c_stride + n;
            if (wide)
                multiply_block<1, V>(x, a_stride, b + n, b_stride, y, c_stride, depth, adds);
            else
                multiply_block<1, 2>(x, a_stride, b + n, b_stride, y, c_stride, depth, adds);
        }
        n += wide ? V * W : 2 * W;
    }
}

struct Chunk {
    int64_t begin, end;  // rows, of one request
    int64_t kv;
};

// What a chunk works on; a row of each belongs to a query and a head.
struct ChunkSpace {
    alignas(64) float q[kMostVectors * MOST_DIM];
    alignas(64) float out[kMostVectors * MOST_DIM];
    alignas(64) float keys[MOST_DIM * kTile];  // [head_dim, tokens]
    alignas(64) float values[kTile * MOST_DIM];
    alignas(64) float scores[kMostVectors * kTile];
    float most[kMostVectors], weight[kMostVectors];
};

// Keys of up to kTile tokens, tokens side by side, and their values, in pairs' order. What is not
// there is zero.
template <class Kv>
static inline void lay_out(const AttendArgs& a, const Chunk& c, int64_t from, int64_t tokens,
                           ChunkSpace& s) {
    const char *keys[kTile], *values[kTile];
    const int64_t n = a.head_dim, stride = padded_dim(n);
    constexpr bool scaled = sizeof(typename Kv::T) == 1;
    find_rows(a, c.begin, c.kv, from, from + tokens, keys, values);
    for (int64_t t = 0; t < kTile; t += W)
        for (int64_t i = 0; i < stride; i += 2 * W) {
            vf low[W], high[W];
            for (int j = 0; j < W; j++) {
                low[j] = high[j] = vf{};
                if (t + j >= tokens || i >= n) continue;
                pair_of<Kv>(keys[t + j], i, n, low[j], high[j]);
                if constexpr (scaled) {
                    float scale;
                    std::memcpy(&scale, keys[t + j] + a.row_bytes - 4, 4);
                    low[j] *= scale, high[j] *= scale;
                }
            }
            transpose(low);
            transpose(high);
            for (int j = 0; j < W; j++) {
                store(s.keys + (i + j) * kTile + t, low[j]);
                store(s.keys + (i + W + j) * kTile + t, high[j]);
            }
        }
    for (int64_t t = 0; t < tokens; t++)
        for (int64_t i = 0; i < stride; i += 2 * W) {
            vf low{}, high{};
            if (i < n) pair_of<Kv>(values[t], i, n, low, high);
            if constexpr (scaled) {
                float scale;
                std::memcpy(&scale, values[t] + a.row_bytes - 4, 4);
                low *= scale, high *= scale;
            }
            store(s.values + t * stride + i, low);
            store(s.values + t * stride + i + W, high);
        }
}

// Scores of a row's tokens [from, from + kTile) become weights, those that it does not see 0.
static inline void weigh_tile(const AttendArgs& a, int64_t position, int64_t from, float* scores,
                              float* most, float* weight, float* out, int64_t stride) {
    const int64_t first = a.window && position + 1 > a.window ? position + 1 - a.window : 0;
    if (from > position || from + kTile <= first) {
        std::memset(scores, 0, kTile * 4);
        return;
    }
    const bool whole = from >= first && from + kTile <= position + 1;
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    vi seen[kTile / W];
    vf high = splat(-INFINITY);
    for (int v = 0; v < kTile / W; v++) {
        vf x = load<vf>(scores + v * W) * a.scale;
        if (a.cap != 0) x = a.cap * hyperbolic_tangent(x / a.cap);
        const vi at = lane + (int32_t)(v * W);
        seen[v] = (at <= (int32_t)(position - from)) & (at >= (int32_t)(first - from));
        if (!whole) x = select(seen[v], x, splat(-INFINITY));
        store(scores + v * W, x);
        high = larger(x, high);
    }
    const float found = largest(high), before = *most;
    if (found > before) *most = found;
    vf total{};
    for (int v = 0; v < kTile / W; v++) {
        vf e = exponential(load<vf>(scores + v * W) - *most);
        if (!whole) e = select(seen[v], e, vf{});
        store(scores + v * W, e);
        total += e;
    }
    if (!(*most > before)) {
        *weight += sum(total);
        return;
    }
    const float faded = before == -INFINITY ? 0.0f : exponential(splat(before - *most))[0];
    *weight = *weight * faded + sum(total);
    for (int64_t i = 0; i < stride; i += W) store(out + i, load<vf>(out + i) * faded);
}

template <class Kv>
static void attend_chunk(const AttendArgs& a, const Chunk& c) {
    const int64_t group = a.heads / a.kv_heads, n = a.head_dim, stride = padded_dim(n);
    const int64_t each = a.heads + 2 * a.kv_heads, vectors = (c.end - c.begin) * group;
    ChunkSpace s;
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = c.begin + v / group, head = c.kv * group + v % group;
        arranged<Kv>(a.qkv + (row * each + head) * n, n, s.q + v * stride);
        s.most[v] = -INFINITY, s.weight[v] = 0;
    }
    std::memset(s.out, 0, vectors * stride * 4);
    const int64_t last = a.positions[c.end - 1] + 1, lowest = a.positions[c.begin] + 1;
    const int64_t first = a.window && lowest > a.window ? lowest - a.window : 0;
    for (int64_t from = first; from < last; from += kTile) {
        const int64_t tokens = last - from < kTile ? last - from : kTile;
        lay_out<Kv>(a, c, from, tokens, s);
        multiply(s.q, stride, vectors, s.keys, kTile, kTile, s.scores, kTile, stride, false);
        for (int64_t v = 0; v < vectors; v++)
            weigh_tile(a, a.positions[c.begin + v / group], from, s.scores + v * kTile, s.most + v,
                       s.weight + v, s.out + v * stride, stride);
        multiply(s.scores, kTile, vectors, s.values, stride, stride, s.out, stride, tokens, true);
    }
    for (int64_t v = 0; v < vectors; v++) {
        const int64_t row = c.begin + v / group, head = c.kv * group + v % group;
        float* to = a.out + (row * a.heads + head) * n;
        restored<Kv>(s.out + v * stride, n, 1.0f / s.weight[v], to);
        if (a.rounded) round_row(to, a.rounded + row * a.rounded_stride + head * n, n);
    }
}
