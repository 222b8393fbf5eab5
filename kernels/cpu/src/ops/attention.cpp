// Attention of queries over a paged cache, query heads that share a key head together.
//
// A query's context is cut into pieces, whose results are put together by whoever finishes the
// last of them: so threads share one long request. How it is cut depends on the context alone.
#include "../step.h"
#include "../tiles.h"
#include "../wide.h"

namespace infopt {
namespace INFOPT_ISA {

constexpr int64_t TOKENS = 256;  // of one softmax
constexpr int64_t MOST_PIECES = 64;
constexpr int64_t AHEAD = 64;  // tokens whose keys are fetched before they are needed

struct Pieces {
    int64_t first, count, each;
};

// Of the tokens that a query at `position` sees.
static inline Pieces pieces_of(int64_t position, int64_t window) {
    int64_t context = position + 1;
    int64_t first = window && context > window ? context - window : 0;
    int64_t seen = context - first;
    int64_t each = seen <= 1024 ? 64 : TOKENS;
    while (each * MOST_PIECES < seen) each *= 2;
    return {first, (seen + each - 1) / each, each};
}

// How keys and values lie in a cache's row, 2W numbers at a time, in an order that suits: dot
// products do not mind, and results are put in order again at the end.
struct Floats {
    typedef float T;
    static void pair(const char* row, int64_t i, vf &a, vf &b) {
        const float* p = reinterpret_cast<const float*>(row) + i;
        a = load<vf>(p), b = load<vf>(p + W);
    }
    static void arrange(vf&, vf&) {}
    static void restore(vf&, vf&) {}
};

struct Bfloats {
    typedef bf16 T;
    static void pair(const char* row, int64_t i, vf &a, vf &b) {
        load_even_odd(reinterpret_cast<const bf16*>(row) + i, a, b);
    }
    static void arrange(vf& a, vf& b) { part(a, b); }
    static void restore(vf& a, vf& b) { unpart(a, b); }
};

struct Bytes {
    typedef int8_t T;
    static void pair(const char* row, int64_t i, vf &a, vf &b) {
        vb low, high;
        std::memcpy(&low, row + i, sizeof low);
        std::memcpy(&high, row + i + W, sizeof high);
        a = __builtin_convertvector(__builtin_convertvector(low, vi), vf);
        b = __builtin_convertvector(__builtin_convertvector(high, vi), vf);
    }
    static void arrange(vf&, vf&) {}
    static void restore(vf&, vf&) {}
};

template <class Kv> static inline void pair_of(const char* row, int64_t i, int64_t n, vf &a, vf &b) {
    if (i + 2 * W <= n) return Kv::pair(row, i, a, b);
    // Beyond a head's numbers may lie anything, infinities too.
    typename Kv::T held[2 * W] = {};
    std::memcpy(held, row + i * sizeof held[0], (n - i) * sizeof held[0]);
    Kv::pair(reinterpret_cast<const char*>(held), 0, a, b);
}

constexpr int64_t MOST_DIM = 512;

static inline int64_t padded_dim(int64_t n) { return (n + 31) / 32 * 32; }

// A head's n numbers in pairs' order, zeros behind them.
template <class Kv>
static inline void arranged(const float* x, int64_t n, float* to) {
    for (int64_t i = 0; i < padded_dim(n); i += 2 * W) {
        vf a, b;
        pair_of<Floats>(reinterpret_cast<const char*>(x), i < n ? i : n, n, a, b);
        Kv::arrange(a, b);
        store(to + i, a);
        store(to + i + W, b);
    }
}

// The other way round, times `scale`.
template <class Kv>
static inline void restored(const float* x, int64_t n, float scale, float* to) {
    for (int64_t i = 0; i < n; i += 2 * W) {
        vf a = load<vf>(x + i) * scale, b = load<vf>(x + i + W) * scale;
        Kv::restore(a, b);
        float held[2 * W];
        store(held, a);
        store(held + W, b);
        std::memcpy(to + i, held, (n - i < 2 * W ? n - i : 2 * W) * 4);
    }
}

// Where keys and values of the tokens [from, to) of a request begin.
static inline void find_rows(const AttendArgs& a, int64_t row, int64_t kv, int64_t from, int64_t to,
                             const char** keys, const char** values) {
    const int32_t* table = a.tables + a.owners[row] * a.width + from / a.block_size;
    const int64_t token = 2 * a.kv_heads * a.row_bytes;
    int64_t within = from % a.block_size;
    const char* block = nullptr;
    for (int64_t t = 0; t < to - from; t++, within++) {
        if (within == a.block_size) within = 0, block = nullptr;
        if (!block) block = static_cast<const char*>(a.cache) + *table++ * a.block_size * token;
        keys[t] = block + within * token + kv * a.row_bytes;
        values[t] = keys[t] + a.kv_heads * a.row_bytes;
    }
}

#include "../pieces.h"

// Put the pieces of one row and key head together, in their order.
template <class Kv>
static void join(const AttendArgs &a, int64_t row, int64_t kv, const float* parts, int64_t count,
                 int64_t size) {
    int64_t group = a.heads / a.kv_heads, n = a.head_dim, stride = padded_dim(n);
    for (int64_t g = 0; g < group; g++) {
        float most = -INFINITY, weight = 0;
        for (int64_t p = 0; p < count; p++) {
            float own = parts[p * size + g];
            most = own > most ? own : most;
        }
        alignas(64) float total[MOST_DIM] = {};
        for (int64_t p = 0; p < count; p++) {
            const float *part = parts + p * size, *out = part + 2 * group + g * stride;
            float faded = exponential(splat(part[g] - most))[0];
            weight += faded * part[group + g];
            for (int64_t i = 0; i < stride; i++) total[i] += faded * out[i];
        }
        float* to = a.out + (row * a.heads + kv * group + g) * n;
        restored<Kv>(total, n, 1.0f / weight, to);
        if (a.rounded)
            round_row(to, a.rounded + row * a.rounded_stride + (to - a.out) % (a.heads * n), n);
    }
}

#include "../chunks.h"
#include "../pair_chunks.h"

// The rows of one request that stand behind one another: taken in chunks, or, where they are few,
// each by itself, in at most so many pieces.
struct Group {
    int64_t begin, end, pieces, chunk;

    Group(const AttendArgs& a, int64_t row) : begin(row), end(row), pieces(0), chunk(0) {
        for (; end < *a.rows && a.owners[end] == a.owners[row]; end++) {
            const int64_t count = pieces_of(a.positions[end], a.window).count;
            if (count > pieces) pieces = count;
        }
        int64_t most = kMostVectors;
        if (end - begin < kChunk || most * a.kv_heads < a.heads) return;
#if defined(__AVX512BF16__)
        if (in_pairs(a)) most = lanes_of_chunk(a, end - begin);
#endif
        chunk = most * a.kv_heads / a.heads;
    }

    int64_t items(const AttendArgs& a) const {
        const int64_t rows = end - begin;
        return (chunk ? (rows + chunk - 1) / chunk : rows * pieces) * a.kv_heads;
    }
};

template <class Kv>
static inline void attend_chunk_of(const AttendArgs& a, const Chunk& chunk) {
#if defined(__AVX512BF16__)
    if constexpr (sizeof(typename Kv::T) == 2)
        if (in_pairs(a)) return attend_pairs(a, chunk);
#endif
    attend_chunk<Kv>(a, chunk);
}

template <class Kv>
static void attend_item(const AttendArgs& a, int64_t row, int64_t alone, int64_t number, int64_t kv,
                        bool goes_on) {
    const int64_t group = a.heads / a.kv_heads, size = group * (padded_dim(a.head_dim) + 2);
    const Pieces cut = pieces_of(a.positions[row], a.window);
    if (number >= cut.count) return;
    const int64_t from = cut.first + number * cut.each, last = a.positions[row] + 1;
    const int64_t to = from + cut.each < last ? from + cut.each : last;
    float* parts = a.parts + (alone * a.kv_heads + kv) * a.splits * size;
    float* own = parts + number * size;
    for (int64_t g = 0; g < group; g++) own[g] = -INFINITY;
    std::memset(own + group, 0, (size - group) * 4);
    const int64_t after = to + cut.each < last ? to + cut.each : last;
    attend_piece<Kv>(a, row, kv, from, to, goes_on ? after : to, own);
    int32_t* done = a.done + alone * a.kv_heads + kv;
    if (__atomic_add_fetch(done, 1, __ATOMIC_ACQ_REL) == cut.count) {
        join<Kv>(a, row, kv, parts, cut.count, size);
        __atomic_store_n(done, 0, __ATOMIC_RELAXED);
    }
}

template <class Kv>
static void attend_rows(const AttendArgs& a, int64_t part, int64_t parts) {
    int64_t all = 0, item = 0, alone = 0;
    bool chunks = false;
    for (int64_t row = 0; row < *a.rows;) {
        const Group rows(a, row);
        all += rows.items(a);
        chunks = chunks || rows.chunk;
        row = rows.end;
    }
    // A prompt's last chunks see most, and come first: at the end threads wait for small ones.
    const Share own(all, 1, chunks ? parts - 1 - part : part, parts);
    for (int64_t row = 0; row < *a.rows && item < own.end;) {
        const Group rows(a, row);
        const int64_t count = rows.end - rows.begin, end = item + rows.items(a);
        for (int64_t i = item > own.begin ? item : own.begin; i < end && i < own.end; i++) {
            // A piece of the context for all rows before the next: it is then still in the cache.
            // Key heads that lie beside one another come one after the other.
            const int64_t at = i - item, kv = at % a.kv_heads, rest = at / a.kv_heads;
            if (rows.chunk) {
                const int64_t begin = rows.begin + rest * rows.chunk, stop = begin + rows.chunk;
                attend_chunk_of<Kv>(a, {begin, stop < rows.end ? stop : rows.end, kv});
                continue;
            }
            attend_item<Kv>(a, rows.begin + rest % count, alone + rest % count, rest / count, kv,
                            count == 1 && i + a.kv_heads < own.end);
        }
        item = end;
        row = rows.end;
        if (!rows.chunk) alone += count;
    }
}

static void attend(const void* given, int64_t part, int64_t parts) {
    const AttendArgs &a = *static_cast<const AttendArgs*>(given);
    if (a.kind == FLOAT32) return attend_rows<Floats>(a, part, parts);
    if (a.kind == BFLOAT16) return attend_rows<Bfloats>(a, part, parts);
    return attend_rows<Bytes>(a, part, parts);
}

extern const Entry attention_ops[] = {
    {"attend", attend, sizeof(AttendArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
