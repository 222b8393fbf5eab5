// Rounding on grids: GPTQ's columns, and the search for a group's grid.
#include "../solve.h"
#include "../wide.h"

namespace infopt {
namespace INFOPT_ISA {

// Rows of a weight that a thread solves at once: their errors for 128 columns stay in its cache.
constexpr int kVectors = 4;
constexpr int kTile = kVectors * kLanes;

// To the nearest, ties to even. From 2^22 on numbers are left as they are: beyond every code.
static inline vf nearest(vf x) {
    const vf magic = splat(12582912.0f);
    const vf size = (vf)((vi)x & 0x7FFFFFFF);
    return select(size < 4194304.0f, (x + magic) - magic, x);
}

static inline vf within(vf x, float most) {
    x = select(x < 0.0f, vf{}, x);
    return select(x > most, splat(most), x);
}

// Up to kTile neighbours; the last tile of a weight may be narrower.
static inline void load_tile(const float* from, std::int64_t width, vf* v) {
    if (width == kTile) {
        for (int i = 0; i < kVectors; ++i) v[i] = load<vf>(from + i * kLanes);
        return;
    }
    alignas(64) float some[kTile] = {};
    std::memcpy(some, from, width * sizeof(float));
    for (int i = 0; i < kVectors; ++i) v[i] = load<vf>(some + i * kLanes);
}

static inline void store_tile(float* to, std::int64_t width, const vf* v) {
    if (width == kTile) {
        for (int i = 0; i < kVectors; ++i) store(to + i * kLanes, v[i]);
        return;
    }
    alignas(64) float some[kTile];
    for (int i = 0; i < kVectors; ++i) store(some + i * kLanes, v[i]);
    std::memcpy(to, some, width * sizeof(float));
}

// What the columns before `column` add to it, by column `column` of a triangle.
static inline void correct(const float* triangle, const std::int64_t* strides, std::int64_t column,
                           const float* done, std::int64_t row, std::int64_t width, float sign,
                           vf* v) {
    vf total[kVectors] = {};
    for (std::int64_t j = 0; j < column; ++j) {
        vf before[kVectors];
        load_tile(done + j * row, width, before);
        const float by = triangle[j * strides[0] + column * strides[1]];
        for (int i = 0; i < kVectors; ++i) total[i] += before[i] * by;
    }
    for (int i = 0; i < kVectors; ++i) v[i] += total[i] * sign;
}

static inline void solve_column(const ColumnsSolveArgs& a, std::int64_t column, std::int64_t at,
                                std::int64_t width) {
    vf x[kVectors], scale[kVectors], zero[kVectors], code[kVectors], error[kVectors];
    const std::int64_t place = column * a.n + at;
    load_tile(a.columns + place, width, x);
    correct(a.factor, a.factor_strides, column, a.errors + at, a.n, width, -1.0f, x);
    if (a.shift) correct(a.shift, a.shift_strides, column, a.columns + at, a.n, width, 1.0f, x);
    load_tile(a.scales + a.groups[column] * a.n + at, width, scale);
    load_tile(a.zeros + a.groups[column] * a.n + at, width, zero);
    const float diagonal = a.factor[column * (a.factor_strides[0] + a.factor_strides[1])];
    alignas(64) std::int32_t stays[kTile] = {};
    if (a.held)
        for (std::int64_t i = 0; i < width; ++i) stays[i] = -(a.held[place + i] != 0);
    for (int i = 0; i < kVectors; ++i) {
        code[i] = within(nearest(x[i] / scale[i]) + zero[i], a.max_code);
        if (a.held) code[i] = select(load<vi>(stays + i * kLanes), zero[i], code[i]);
        error[i] = (x[i] - (code[i] - zero[i]) * scale[i]) / diagonal;
    }
    store_tile(a.columns + place, width, x);
    store_tile(a.codes + place, width, code);
    store_tile(a.errors + place, width, error);
}

static void gptq_columns(const void* given, std::int64_t part, std::int64_t parts) {
    const ColumnsSolveArgs& a = *static_cast<const ColumnsSolveArgs*>(given);
    const Share own(a.n, kTile, part, parts);
    for (std::int64_t at = own.begin; at < own.end; at += kTile) {
        const std::int64_t width = own.end - at < kTile ? own.end - at : kTile;
        for (std::int64_t column = 0; column < a.count; ++column)
            solve_column(a, column, at, width);
    }
}

static inline vf lost(vf x, float scale, float zero, float most) {
    const vf error = (within(nearest(x / scale) + zero, most) - zero) * scale - x;
    return error * error;
}

static void grid_errors(const void* given, std::int64_t part, std::int64_t parts) {
    const GridErrorsArgs& a = *static_cast<const GridErrorsArgs*>(given);
    const Share own(a.groups, 1, part, parts);
    const std::int64_t whole = a.width / kLanes * kLanes;
    for (std::int64_t g = own.begin; g < own.end; ++g) {
        const float* weights = a.weights + g * a.width;
        alignas(64) float rest[kLanes] = {};  // zeros are on every grid: they add nothing
        std::memcpy(rest, weights + whole, (a.width - whole) * sizeof(float));
        for (std::int64_t c = 0; c < a.grids; ++c) {
            const float scale = a.scales[c * a.groups + g], zero = a.zeros[c * a.groups + g];
            vf total{};
            for (std::int64_t i = 0; i < whole; i += kLanes)
                total += lost(load<vf>(weights + i), scale, zero, a.max_code);
            if (whole < a.width) total += lost(load<vf>(rest), scale, zero, a.max_code);
            a.errors[c * a.groups + g] = sum(total);
        }
    }
}

extern const Entry solve_ops[] = {
    {"gptq_columns", gptq_columns, sizeof(ColumnsSolveArgs)},
    {"grid_errors", grid_errors, sizeof(GridErrorsArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
