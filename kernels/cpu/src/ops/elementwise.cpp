// Embedding, norms, rotation and cache, gates: each thread does its share of the rows or heads.
#include "../curves.h"

namespace infopt {
namespace INFOPT_ISA {

static void embed(const void* given, int64_t part, int64_t parts) {
    const EmbedArgs &a = *static_cast<const EmbedArgs*>(given);
    const Share own(*a.rows, 1, part, parts);
    for (int64_t r = own.begin; r < own.end; r++) {
        float* x = a.x + r * a.width;
        const float* f = static_cast<const float*>(a.table) + a.ids[r] * a.width;
        const bf16* h = static_cast<const bf16*>(a.table) + a.ids[r] * a.width;
        for (int64_t i = 0; i < a.width; i++) {
            float found = (a.kind == BFLOAT16 ? to_float(h[i]) : f[i]) * a.scale;
            x[i] = a.adds ? x[i] + found : found;
        }
    }
}

static void round(const void* given, int64_t part, int64_t parts) {
    const RoundArgs& a = *static_cast<const RoundArgs*>(given);
    const Share own(*a.rows, 1, part, parts);
    for (int64_t r = own.begin; r < own.end; r++)
        round_row(a.x + r * a.width, a.rounded + r * a.rounded_stride, a.width);
}

static void columns(const void* given, int64_t part, int64_t parts) {
    const ColumnsArgs& a = *static_cast<const ColumnsArgs*>(given);
    const Share own(*a.rows, 1, part, parts);
    for (int64_t r = own.begin; r < own.end; r++) {
        float* out = a.out + r * a.width;
        for (int64_t i = 0; i < a.width; i++) out[i] = a.x[r * a.width + a.columns[i]];
        if (a.rounded) round_row(out, a.rounded + r * a.rounded_stride, a.width);
    }
}

static void add(const void* given, int64_t part, int64_t parts) {
    const AddArgs &a = *static_cast<const AddArgs*>(given);
    const Share own(*a.rows, 1, part, parts);
    for (int64_t i = own.begin * a.width; i < own.end * a.width; i++) a.x[i] += a.added[i];
}

// In the order of the vectors, then those left over: whatever else there is, the same sum.
template <class Term> static inline float row_sum(int64_t width, Term term) {
    vf total{};
    int64_t i = 0;
    for (; i + W <= width; i += W) total += term(i);
    float found = sum(total);
    if (i < width) {
        float left = 0;
        for (; i < width; i++) left += term.one(i);
        found += left;
    }
    return found;
}

struct Plain {
    const float* x;
    vf operator()(int64_t i) const { return load<vf>(x + i); }
    float one(int64_t i) const { return x[i]; }
};

struct Squared {
    const float* x;
    float mean;
    vf operator()(int64_t i) const {
        vf d = load<vf>(x + i) - mean;
        return d * d;
    }
    float one(int64_t i) const { return (x[i] - mean) * (x[i] - mean); }
};

static inline void norm_row(const float* x, const float* weight, const float* bias, float* out,
                            int64_t width, float eps) {
    float mean = bias ? row_sum(width, Plain{x}) / (float)width : 0.0f;
    float scale = 1.0f / sqrtf(row_sum(width, Squared{x, mean}) / (float)width + eps);
    int64_t i = 0;
    for (; i + W <= width; i += W) {
        vf y = (load<vf>(x + i) - mean) * scale * load<vf>(weight + i);
        store(out + i, bias ? y + load<vf>(bias + i) : y);
    }
    for (; i < width; i++) {
        float y = (x[i] - mean) * scale * weight[i];
        out[i] = bias ? y + bias[i] : y;
    }
}

static void norm(const void* given, int64_t part, int64_t parts) {
    const NormArgs &a = *static_cast<const NormArgs*>(given);
    const Share own(*a.rows, 1, part, parts);
    for (int64_t r = own.begin; r < own.end; r++) {
        float* x = a.x + r * a.width;
        if (a.added)
            for (int64_t i = 0; i < a.width; i++) x[i] += a.added[r * a.width + i];
        norm_row(x, a.weight, a.bias, a.out + r * a.width, a.width, a.eps);
        if (a.rounded) round_row(a.out + r * a.width, a.rounded + r * a.rounded_stride, a.width);
    }
}

static void angles(const void* given, int64_t part, int64_t parts) {
    const AnglesArgs &a = *static_cast<const AnglesArgs*>(given);
    const Share own(*a.rows * a.half, 1, part, parts);
    for (int64_t i = own.begin; i < own.end; i++) {
        float angle = (float)a.positions[i / a.half] * a.frequencies[i % a.half];
        a.cos[i] = cosf(angle) * a.magnitude;
        a.sin[i] = sinf(angle) * a.magnitude;
    }
}

static inline void rotate(float* x, const float* cos, const float* sin, int64_t half) {
    int64_t i = 0;
    for (; i + W <= half; i += W) {
        vf low = load<vf>(x + i), high = load<vf>(x + half + i), c = load<vf>(cos + i), s = load<vf>(sin + i);
        store(x + i, low * c - high * s);
        store(x + half + i, high * c + low * s);
    }
    for (; i < half; i++) {
        float low = x[i], high = x[half + i];
        x[i] = low * cos[i] - high * sin[i];
        x[half + i] = high * cos[i] + low * sin[i];
    }
}

// As eight_bits.encode: codes, and the scale behind them.
static inline void write_int8(int8_t* row, const float* x, int64_t n, int64_t row_bytes,
                              const float* calibrated) {
    float most = 0, total = 0;
    for (int64_t i = 0; i < n; i++) {
        most = fabsf(x[i]) > most ? fabsf(x[i]) : most;
        total += x[i];
    }
    float scale = calibrated ? *calibrated : most / 127.0f;
    if (scale == 0) scale = 1;
    // What is not finite leaves a row without a finite value.
    float held = scale + 0.0f * total;
    for (int64_t i = 0; i < n; i++) {
        float step = nearbyintf(x[i] / scale);
        row[i] = (int8_t)(step > 127 ? 127 : step > -128 ? step : -128);
    }
    for (int64_t i = n; i < row_bytes - 4; i++) row[i] = 0;
    std::memcpy(row + row_bytes - 4, &held, 4);
}

static inline void write_row(const CacheArgs &a, int64_t slot, int64_t head, const float* x) {
    char* row = static_cast<char*>(a.cache) + (slot * 2 * a.kv_heads + head) * a.row_bytes;
    if (a.kind == FLOAT32) {
        std::memcpy(row, x, a.head_dim * 4);
    } else if (a.kind == BFLOAT16) {
        round_row(x, reinterpret_cast<bf16*>(row), a.head_dim);
    } else {
        write_int8(reinterpret_cast<int8_t*>(row), x, a.head_dim, a.row_bytes,
                   a.scales ? a.scales + head : nullptr);
    }
}

static void rotate_and_cache(const void* given, int64_t part, int64_t parts) {
    const CacheArgs &a = *static_cast<const CacheArgs*>(given);
    int64_t each = a.heads + 2 * a.kv_heads, turned = a.heads + a.kv_heads;
    const Share own(*a.rows * each, 1, part, parts);
    for (int64_t item = own.begin; item < own.end; item++) {
        int64_t r = item / each, head = item % each;
        float* x = a.qkv + item * a.head_dim;
        if (head < turned) {
            if (a.weight)
                norm_row(x, a.weight + head * a.head_dim, nullptr, x, a.head_dim, a.eps);
            if (a.cos) rotate(x, a.cos + r * a.half, a.sin + r * a.half, a.half);
        }
        if (head >= a.heads) write_row(a, a.slots[r], head - a.heads, x);
    }
}

template <int curve> static void gated(const GateArgs &a, int64_t part, int64_t parts) {
    // In vectors, those left over in a vector as well: a column is computed the same by any thread.
    int64_t vectors = (a.inner + W - 1) / W, stride = a.gated ? 2 * a.inner : a.inner;
    const Share own(*a.rows * vectors, 1, part, parts);
    for (int64_t item = own.begin; item < own.end; item++) {
        int64_t r = item / vectors, i = item % vectors * W;
        const float* x = a.x + r * stride + i;
        float* out = a.out + r * a.inner + i;
        const int64_t left = a.inner - i < W ? a.inner - i : W;
        if (left == W) {
            vf y = activated<curve>(load<vf>(x));
            store(out, a.gated ? y * load<vf>(x + a.inner) : y);
        } else {
            float gate[W] = {}, up[W] = {};
            std::memcpy(gate, x, left * 4);
            if (a.gated) std::memcpy(up, x + a.inner, left * 4);
            vf y = activated<curve>(load<vf>(gate));
            store(gate, a.gated ? y * load<vf>(up) : y);
            std::memcpy(out, gate, left * 4);
        }
        if (a.rounded) round_row(out, a.rounded + r * a.rounded_stride + i, left);
    }
}

static void gate(const void* given, int64_t part, int64_t parts) {
    const GateArgs &a = *static_cast<const GateArgs*>(given);
    switch (a.curve) {
        case SILU: return gated<SILU>(a, part, parts);
        case RELU: return gated<RELU>(a, part, parts);
        case GELU: return gated<GELU>(a, part, parts);
        default: return gated<GELU_TANH>(a, part, parts);
    }
}

static void cap(const void* given, int64_t part, int64_t parts) {
    const CapArgs &a = *static_cast<const CapArgs*>(given);
    int64_t vectors = (a.width + W - 1) / W;
    const Share own(*a.rows * vectors, 1, part, parts);
    for (int64_t item = own.begin; item < own.end; item++) {
        int64_t i = item % vectors * W, left = a.width - i < W ? a.width - i : W;
        float held[W] = {}, *x = a.x + item / vectors * a.width + i;
        std::memcpy(held, x, left * 4);
        store(held, a.cap * hyperbolic_tangent(load<vf>(held) / a.cap));
        std::memcpy(x, held, left * 4);
    }
}

extern const Entry elementwise_ops[] = {
    {"embed", embed, sizeof(EmbedArgs)},
    {"round", round, sizeof(RoundArgs)},
    {"columns", columns, sizeof(ColumnsArgs)},
    {"norm", norm, sizeof(NormArgs)},
    {"add", add, sizeof(AddArgs)},
    {"angles", angles, sizeof(AnglesArgs)},
    {"rotate_and_cache", rotate_and_cache, sizeof(CacheArgs)},
    {"gate", gate, sizeof(GateArgs)},
    {"cap", cap, sizeof(CapArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
