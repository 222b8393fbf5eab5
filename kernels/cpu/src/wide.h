// Arithmetic on whole vectors beyond what simd.h has: exponentials, sums across vectors.
#pragma once

#include <math.h>

#include "simd.h"

namespace infopt {
namespace INFOPT_ISA {

constexpr int W = kLanes;
typedef std::int8_t vb __attribute__((vector_size(kLanes)));

// 2W numbers of bfloat16, those in even places and those in odd ones: two instructions.
static inline void load_even_odd(const bf16* p, vf &even, vf &odd) {
    const vu u = load<vu>(p);
    even = (vf)(u << 16);
    odd = (vf)(u & 0xFFFF0000u);
}

static inline vf select(vi mask, vf yes, vf no) {
    return (vf)(((vi)yes & mask) | ((vi)no & ~mask));
}

// The larger; the second where either is no number.
static inline vf larger(vf a, vf b) { return select(a > b, a, b); }

// In a tree, whose shape depends on W alone.
static inline float sum(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);  // the same tree
#endif
    float held[W];
    store(held, v);
    for (int half = W / 2; half; half /= 2)
        for (int i = 0; i < half; i++) held[i] += held[i + half];
    return held[0];
}

static inline float largest(vf v) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)v);
#endif
    float found = v[0];
    for (int i = 1; i < W; i++) found = v[i] > found ? v[i] : found;
    return found;
}

// exp(x) within 2 units of the last place from -87.3 to 88; beyond, the value at the border, so
// never 0 and never infinite. What is not a number stays so.
static inline vf exponential(vf x) {
#if defined(__AVX512F__)
    // Of a number and none these return the second.
    x = (vf)_mm512_max_ps((__m512)splat(-87.3f), (__m512)x);
    x = (vf)_mm512_min_ps((__m512)splat(88.0f), (__m512)x);
#else
    x = select(x < splat(-87.3f), splat(-87.3f), x);
    x = select(x > splat(88.0f), splat(88.0f), x);
#endif
    // Adding 1.5 * 2^23 rounds to an integer, which is then in the lowest bits.
    const vf shift = splat(12582912.0f);
    vf shifted = x * 1.44269504f + shift;
    vf n = shifted - shift;
    vf r = x - n * 0.693145752f;
    r = r - n * 1.42860677e-6f;
    vf p = splat(1.0f / 5040.0f);
    p = p * r + 1.0f / 720.0f;
    p = p * r + 1.0f / 120.0f;
    p = p * r + 1.0f / 24.0f;
    p = p * r + 1.0f / 6.0f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const vu power = ((vu)shifted - (vu)shift + 127u) << 23;
    return p * (vf)power;
}

static inline vf hyperbolic_tangent(vf x) { return 1.0f - 2.0f / (exponential(2.0f * x) + 1.0f); }

template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
    typedef Indices<I...> type;
};

template <int S, int... I>
static inline vf halved(vf a, vf b, Indices<I...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (I / (S / 2) * S + I % (S / 2))...) +
           __builtin_shufflevector(a, b, (I / (S / 2) * S + I % (S / 2) + S / 2)...);
#else
    return __builtin_shuffle(a, b, vi{(I / (S / 2) * S + I % (S / 2))...}) +
           __builtin_shuffle(a, b, vi{(I / (S / 2) * S + I % (S / 2) + S / 2)...});
#endif
}

// Each vector's blocks of S numbers halved by adding one half to the other, b's behind a's.
template <int S> static inline vf halved(vf a, vf b) {
    return halved<S>(a, b, typename UpTo<W>::type());
}

// Whichever of 2W numbers the indices say, of a's and then b's.
template <int... I>
static inline vf chosen(vf a, vf b) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, I...);
#else
    return __builtin_shuffle(a, b, vi{I...});
#endif
}

template <int... I>
static inline void evens_and_odds(vf& a, vf& b, Indices<I...>) {
    const vf even = chosen<(2 * I)...>(a, b);
    b = chosen<(2 * I + 1)...>(a, b);
    a = even;
}

template <int... I>
static inline void by_turns(vf& a, vf& b, Indices<I...>) {
    const vf low = chosen<(I % 2 * W + I / 2)...>(a, b);
    b = chosen<(I % 2 * W + I / 2 + W / 2)...>(a, b);
    a = low;
}

// 2W numbers in a and b: first those in even places, then those in odd ones; and back.
static inline void part(vf& a, vf& b) { evens_and_odds(a, b, typename UpTo<W>::type()); }
static inline void unpart(vf& a, vf& b) { by_turns(a, b, typename UpTo<W>::type()); }

template <int H, int... I>
static inline void swapped(vf& a, vf& b, Indices<I...>) {
    const vf first = chosen<((I & H) ? W + I - H : I)...>(a, b);
    b = chosen<((I & H) ? W + I : I + H)...>(a, b);
    a = first;
}

template <int H>
static inline void swap_blocks(vf* v) {
    for (int i = 0; i < W; i++)
        if (!(i & H)) swapped<H>(v[i], v[i + H], typename UpTo<W>::type());
}

// W vectors of W: rows become columns.
static inline void transpose(vf* v) {
    if constexpr (W >= 16) swap_blocks<8>(v);
    if constexpr (W >= 8) swap_blocks<4>(v);
    swap_blocks<2>(v);
    swap_blocks<1>(v);
}

// The sums of W vectors, side by side.
static inline vf sums(const vf* v) {
    vf held[W / 2];
    for (int i = 0; i < W / 2; i++) held[i] = halved<W>(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < W / 4; i++) held[i] = halved<W / 2>(held[2 * i], held[2 * i + 1]);
    if constexpr (W >= 8)
        for (int i = 0; i < W / 8; i++) held[i] = halved<W / 4>(held[2 * i], held[2 * i + 1]);
    if constexpr (W >= 16) held[0] = halved<W / 8>(held[0], held[1]);
    return held[0];
}

// As `narrow`, in one instruction where there is one; that takes subnormal numbers for zero.
static inline vh narrow_fast(vf v) {
#if defined(__AVX512BF16__)
    return (vh)_mm512_cvtneps_pbh((__m512)v);
#else
    return narrow(v);
#endif
}

static inline void round_row(const float* x, bf16* to, std::int64_t n) {
    std::int64_t i = 0;
    for (; i + W <= n; i += W) store(to + i, narrow(load<vf>(x + i)));
    for (; i < n; i++) to[i] = to_bf16(x[i]);
}

}  // namespace INFOPT_ISA
}  // namespace infopt
