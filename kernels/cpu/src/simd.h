// Vectors of floats, as wide as the set of instructions at hand has them.
#pragma once

#include <cstdint>
#include <cstring>

#include "ops.h"

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace infopt {
namespace INFOPT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float vf __attribute__((vector_size(4 * kLanes)));
typedef std::int32_t vi __attribute__((vector_size(4 * kLanes)));
typedef std::uint32_t vu __attribute__((vector_size(4 * kLanes)));
typedef std::uint16_t vh __attribute__((vector_size(2 * kLanes)));

template <class V, class T>
static inline V load(const T* from) {
    V v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

template <class V, class T>
static inline void store(T* to, V v) {
    std::memcpy(to, &v, sizeof v);
}

static inline vf splat(float x) { return vf{} + x; }

static inline vf widen(vh h) { return (vf)(__builtin_convertvector(h, vu) << 16); }

// To the nearest, ties to even; a NaN stays one.
static inline vh narrow(vf v) {
    const vu u = (vu)v;
    const vu rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    const vu nan = (u >> 16) | 0x40u;
    const vu is_nan = (vu)(v != v);
    return __builtin_convertvector((rounded & ~is_nan) | (nan & is_nan), vh);
}

static inline float to_float(bf16 h) {
    const std::uint32_t u = static_cast<std::uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
}

static inline bf16 to_bf16(float f) {
    std::uint32_t u;
    std::memcpy(&u, &f, 4);
    if (f != f) return static_cast<bf16>((u >> 16) | 0x40u);
    return static_cast<bf16>((u + 0x7FFFu + ((u >> 16) & 1u)) >> 16);
}

// Of 16-bit floats, whose exponents' biases differ from float32's by 112.
static inline vf widen_half(vh h) {
    const vu u = __builtin_convertvector(h, vu);
    const vf magnitude = (vf)((u & 0x7FFFu) << 13) * 0x1p112f;
    return (vf)((vu)magnitude | ((u & 0x8000u) << 16));
}

// kLanes numbers of a type.
static inline vf load_as(const void* from, std::int64_t at, std::int32_t type) {
    if (type == kFloat32) return load<vf>(static_cast<const float*>(from) + at);
    const vh half = load<vh>(static_cast<const std::uint16_t*>(from) + at);
    return type == kBFloat16 ? widen(half) : widen_half(half);
}

// Fetches what will be met `Rows` times or more: by one row once, so that it need not stay. CPUs
// with tiles read at less than half the speed where they are told so (docs/results/native-kernels).
template <int Rows>
static inline void prefetch(const void* at) {
#if defined(__AMX_TILE__)
    __builtin_prefetch(at, 0, 3);
#else
    __builtin_prefetch(at, 0, Rows == 1 ? 0 : 3);
#endif
}

}  // namespace INFOPT_ISA
}  // namespace infopt
