// Products by tiles (AMX): 16 or 32 rows of inputs times a panel's outputs, 64 bytes of each in a
// step. Panels lie as tiles want them: 16 units of 16 outputs, four bytes each, are one.
//
// A row's sums are the same however many rows a tile holds, so that all products go this way, a
// single row's too: a weight is read as fast then as by any other instruction.
#pragma once

#if defined(__AMX_TILE__)

#include "panels.h"

namespace infopt {
namespace INFOPT_ISA {

// Units of a tile of weights, rows of one of inputs, and bytes of a row of either.
constexpr std::int64_t kTileUnits = 16, kTileRows = 16, kTileBytes = 64;
// Bytes of a unit of a panel, and of a panel's share in a step.
constexpr std::int64_t kUnitBytes = kPanel * 4, kStepBytes = kTileUnits * kUnitBytes;
// How far ahead weights are fetched that are met by few rows.
constexpr std::int64_t kTilesAhead = 2 * kStepBytes;
// Bytes of rows that stay in the second-level cache while panel after panel meets them.
constexpr std::int64_t kTiledBytes = 1 << 20;

// Sums of 32 rows of a panel.
struct TileSums {
    alignas(64) std::int32_t at[2 * kTileRows][kPanel];
};

// The shapes of this thread's tiles, which are given back at the end: 0 to 3 are sums, two for
// each 16 rows; 4 and 5 inputs of 16 rows each; 6 and 7 weights of 16 outputs each.
class Tiles {
  public:
    ~Tiles() {
        if (rows_ != 0) _tile_release();
    }

    // For 1 to 32 rows of inputs.
    void shape(std::int64_t rows) {
        if (rows == rows_) return;
        rows_ = rows;
        alignas(64) Shape shape = {};
        shape.palette = 1;
        const std::int64_t low = rows < kTileRows ? rows : kTileRows, high = rows - low;
        const std::int64_t held[8] = {low, low, high, high, low, high, kTileUnits, kTileUnits};
        for (int tile = 0; tile < 8; ++tile) {
            shape.rows[tile] = static_cast<std::uint8_t>(held[tile]);
            shape.bytes[tile] = held[tile] == 0 ? 0 : static_cast<std::uint16_t>(kTileBytes);
        }
        _tile_loadconfig(&shape);
    }

  private:
    struct Shape {
        std::uint8_t palette, first, none[14];
        std::uint16_t bytes[16];
        std::uint8_t rows[16];
    };
    std::int64_t rows_ = 0;
};

// The compiler does not know that loads of tiles read memory: what was stored before must be there.
static inline void stores_are_done() { asm volatile("" ::: "memory"); }

struct BFloat16Tiles {
    static void low() {
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
    }
    static void high() {
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
};

// Inputs without a sign, weights with one.
struct IntegerTiles {
    static void low() {
        _tile_dpbusd(0, 4, 6);
        _tile_dpbusd(1, 4, 7);
    }
    static void high() {
        _tile_dpbusd(2, 5, 6);
        _tile_dpbusd(3, 5, 7);
    }
};

// Adds one step: `x` 64 bytes of each row, `w` 16 units of a panel.
template <class Dot, bool Two>
static inline void add_step(const char* x, std::int64_t stride, const char* w) {
    _tile_loadd(6, w, kUnitBytes);
    _tile_loadd(4, x, stride);
    _tile_loadd(7, w + kTileBytes, kUnitBytes);
    Dot::low();
    if constexpr (Two) {
        _tile_loadd(5, x + kTileRows * stride, stride);
        Dot::high();
    }
}

template <bool Two>
static inline void clear_sums() {
    _tile_zero(0);
    _tile_zero(1);
    if constexpr (Two) {
        _tile_zero(2);
        _tile_zero(3);
    }
}

// Sums lie row by row, a panel's outputs in each.
template <bool Two>
static inline void keep_sums(void* sums) {
    char* at = static_cast<char*>(sums);
    _tile_stored(0, at, kUnitBytes);
    _tile_stored(1, at + kTileBytes, kUnitBytes);
    if constexpr (Two) {
        _tile_stored(2, at + kTileRows * kUnitBytes, kUnitBytes);
        _tile_stored(3, at + kTileRows * kUnitBytes + kTileBytes, kUnitBytes);
    }
}

template <bool Two>
static inline void load_sums(const void* sums) {
    const char* at = static_cast<const char*>(sums);
    _tile_loadd(0, at, kUnitBytes);
    _tile_loadd(1, at + kTileBytes, kUnitBytes);
    if constexpr (Two) {
        _tile_loadd(2, at + kTileRows * kUnitBytes, kUnitBytes);
        _tile_loadd(3, at + kTileRows * kUnitBytes + kTileBytes, kUnitBytes);
    }
}

// Up to 32 rows of inputs.
struct TileRows {
    const char* x;
    std::int64_t stride, rows;
};

// The last step, which is no whole one: nothing is read beyond rows and panel.
template <class Dot, bool Two>
static inline void add_rest(const TileRows& given, const char* x, const char* w, std::int64_t units,
                            std::int64_t bytes) {
    alignas(64) char rows[2 * kTileRows][kTileBytes] = {}, weights[kStepBytes] = {};
    for (std::int64_t r = 0; r < given.rows; ++r) std::memcpy(rows[r], x + r * given.stride, bytes);
    std::memcpy(weights, w, units * kUnitBytes);
    stores_are_done();
    add_step<Dot, Two>(rows[0], kTileBytes, weights);
}

// The sums of a panel at `w`, for rows of `bytes` bytes. `lines` of what is needed next, from
// `ahead` on, are fetched in each step.
template <class Dot, bool Two>
static inline void tile_block(const TileRows& given, std::int64_t bytes, const char* w,
                              const char* ahead, int lines, TileSums& sums) {
    clear_sums<Two>();
    const char* x = given.x;
    for (; bytes >= kTileBytes; bytes -= kTileBytes, x += kTileBytes, w += kStepBytes) {
        for (int line = 0; line < lines; ++line, ahead += 64) __builtin_prefetch(ahead, 0, 2);
        add_step<Dot, Two>(x, given.stride, w);
    }
    if (bytes > 0) add_rest<Dot, Two>(given, x, w, (bytes + 3) / 4, bytes);
    keep_sums<Two>(&sums);
}

// Where a panel's outputs go, to be fetched while they are computed.
struct Outputs {
    char* at;
    std::int64_t stride, bytes;

    void fetch(std::int64_t row, std::int64_t rows) const {
        for (std::int64_t r = row; r < row + rows; ++r)
            for (std::int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(at + r * stride + b, 1, 3);
    }
};

// What is fetched while blocks of 32 rows go through a panel of weights at `w`. A single block is
// through with the panel at once; several fetch the one at `next`, each a part.
struct Ahead {
    const char* from;
    std::int64_t each;
    int lines;

    Ahead(const char* w, const char* next, std::int64_t bytes, std::int64_t rows) {
        const std::int64_t blocks = (rows + 2 * kTileRows - 1) / (2 * kTileRows);
        lines = static_cast<int>((kStepBytes / 64 + blocks - 1) / blocks);
        each = (bytes + kTileBytes - 1) / kTileBytes * lines * 64;
        from = blocks == 1 ? w + kTilesAhead : next;
    }
    const char* of(std::int64_t row) const { return from + row / (2 * kTileRows) * each; }
};

// Calls body(given, row) for 32 rows after the other, tiles shaped for them.
template <class Body>
static inline void for_tiles(Tiles& tiles, const char* x, std::int64_t stride, std::int64_t rows, Body body) {
    for (std::int64_t row = 0; row < rows; row += 2 * kTileRows) {
        const std::int64_t left = rows - row;
        const TileRows some{x + row * stride, stride, left < 2 * kTileRows ? left : 2 * kTileRows};
        tiles.shape(some.rows);
        body(some, row);
    }
}

// `tile_block` for as many rows as there are.
template <class Dot>
static inline void tile_rows(const TileRows& some, std::int64_t row, std::int64_t bytes, const char* w,
                             const Ahead& ahead, TileSums& sums) {
    if (some.rows > kTileRows)
        tile_block<Dot, true>(some, bytes, w, ahead.of(row), ahead.lines, sums);
    else
        tile_block<Dot, false>(some, bytes, w, ahead.of(row), ahead.lines, sums);
}

// Rows of `row_bytes` that are taken together: blocks alike in size.
static inline std::int64_t tiled_rows(std::int64_t m, std::int64_t row_bytes) {
    constexpr std::int64_t kGrain = 2 * kTileRows;
    const std::int64_t held = kTiledBytes / row_bytes / kGrain * kGrain;
    const std::int64_t most = held < kGrain ? kGrain : held;
    const std::int64_t blocks = m <= most ? 1 : (m + most - 1) / most;
    const std::int64_t size = m < 1 ? 1 : (m + blocks - 1) / blocks;
    return (size + kGrain - 1) / kGrain * kGrain;
}

// As `by_units`, for inputs of bfloat16 or of 8 bits.
template <class Form, class Dot, class Args>
static inline void by_tiles(const Args& args, std::int64_t part, std::int64_t parts) {
    using Vector = typename Form::Vector;
    const std::int64_t bytes = args.k * 4 / Form::kInputs, stride = args.x_stride * 4 / Form::kInputs;
    const std::int64_t panel_bytes = (bytes + 3) / 4 * kUnitBytes;
    Tiles tiles;
    const std::int64_t y_bytes = args.y_type == kFloat32 ? 4 : 2;
    const auto product = [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
        const Outputs y{static_cast<char*>(args.y) + (row0 * args.y_stride + panel * kPanel) * y_bytes,
                        args.y_stride * y_bytes, kPanel * y_bytes};
        const char* w = static_cast<const char*>(args.weight) + panel * panel_bytes;
        const Ahead ahead(w, w + panel_bytes, bytes, rows);
        TileSums found;
        for_tiles(tiles, static_cast<const char*>(args.x) + row0 * stride, stride, rows,
                  [&](const TileRows& some, std::int64_t row) {
                      y.fetch(row, some.rows);
                      tile_rows<Dot>(some, row, bytes, w, ahead, found);
                      for (std::int64_t r = 0; r < some.rows; ++r) {
                          Vector sums[kVectors];
                          for (int v = 0; v < kVectors; ++v) sums[v] = load<Vector>(found.at[r] + v * kLanes);
                          Form::finish(args, row0 + row + r, panel * kPanel, sums);
                      }
                  });
    };
    const std::int64_t m = rows_of(args);
    for_blocks(m, args.n, tiled_rows(m, stride), part, parts, product);
}

}  // namespace INFOPT_ISA
}  // namespace infopt

#endif
