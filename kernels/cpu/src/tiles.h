// Products by the CPU's tiles (AMX): 16 rows of inputs by 16 outputs, 64 bytes of inputs at a time.
// A tile of weights is what a panel holds: for 16 outputs, 16 units of 4 bytes after one another.
#pragma once

#if defined(__AMX_TILE__)

#include <immintrin.h>

#include <cstdint>

namespace infopt {
namespace INFOPT_ISA {

constexpr std::int64_t kTileRows = 16, kTileUnits = 16;

// While it lives the thread's tiles are 16 rows of 64 bytes each: 0 to 3 for sums, 4 and 5 for
// inputs, 6 and 7 for weights.
struct Tiles {
    Tiles() {
        struct alignas(64) {
            std::uint8_t palette = 1, start = 0, reserved[14] = {};
            std::uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } config;
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// The two kinds of numbers. `Rows` is how many tiles of inputs there are, 1 or 2.
struct TilesOfBFloat16 {
    template <int Rows>
    static inline void multiply() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if constexpr (Rows == 2) {
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
};

struct TilesOfIntegers {  // inputs without a sign, weights with one
    template <int Rows>
    static inline void multiply() {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
        if constexpr (Rows == 2) {
            _tile_dpbusd(2, 5, 6);
            _tile_dpbusd(3, 5, 7);
        }
    }
};

// c [16 Rows, 32] (+)= a [16 Rows, units] * b [units, 32], of units of 4 bytes; units a multiple of
// 16, strides in bytes. Needs `Tiles`.
template <class Kind, int Rows>
static inline void multiply_tiles(const char* a, std::int64_t a_stride, const char* b,
                                  std::int64_t b_stride, char* c, std::int64_t c_stride,
                                  std::int64_t units, bool adds) {
    // The compiler does not know that tiles are loaded from memory.
    __asm__ volatile("" ::: "memory");
    if (adds) {
        _tile_loadd(0, c, c_stride);
        _tile_loadd(1, c + 64, c_stride);
        if constexpr (Rows == 2) {
            _tile_loadd(2, c + 16 * c_stride, c_stride);
            _tile_loadd(3, c + 16 * c_stride + 64, c_stride);
        }
    } else {
        _tile_zero(0);
        _tile_zero(1);
        if constexpr (Rows == 2) {
            _tile_zero(2);
            _tile_zero(3);
        }
    }
    for (std::int64_t unit = 0; unit < units; unit += kTileUnits) {
        _tile_loadd(6, b + unit * b_stride, b_stride);
        _tile_loadd(7, b + unit * b_stride + 64, b_stride);
        _tile_loadd(4, a + unit * 4, a_stride);
        if constexpr (Rows == 2) _tile_loadd(5, a + 16 * a_stride + unit * 4, a_stride);
        Kind::template multiply<Rows>();
    }
    _tile_stored(0, c, c_stride);
    _tile_stored(1, c + 64, c_stride);
    if constexpr (Rows == 2) {
        _tile_stored(2, c + 16 * c_stride, c_stride);
        _tile_stored(3, c + 16 * c_stride + 64, c_stride);
    }
}

}  // namespace INFOPT_ISA
}  // namespace infopt

#endif
