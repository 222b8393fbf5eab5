// Products whose panels hold, for each output, a unit of 4 bytes after the other: one input of
// float32, two of bfloat16, four of int8.
#pragma once

#include "panels.h"

namespace infopt {
namespace INFOPT_ISA {

// Units that are summed at a time where there are many rows: so much of a panel and of a chunk of
// rows stays near. Sums in between are kept as they are in registers.
constexpr std::int64_t kSliceUnits = 256;

// R rows of a block over a slice of units, V vectors of a panel's outputs from `first` on. `kept`
// has the sums of the units before, by row of the block, and gets those of these. A Form says what
// sums are (Vector), how a unit is added, and how a row is finished.
template <class Form, int R, int V, class Args>
static inline void chunk(const Args& args, std::int64_t begin, std::int64_t end, std::int64_t row0,
                         std::int64_t row, std::int64_t panel, int first, std::int32_t (*kept)[kPanel]) {
    using Vector = typename Form::Vector;
    const std::int64_t units = (args.k + Form::kInputs - 1) / Form::kInputs;
    const std::int64_t stride = args.x_stride * 4 / Form::kInputs;
    const RowAddresses<R> x(static_cast<const char*>(args.x) + (row0 + row) * stride, stride);
    const char* w = static_cast<const char*>(args.weight) +
                    ((panel * units + begin) * kPanel + first * kLanes) * 4;
    Vector sums[R][V];
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            sums[r][v] = begin == 0 ? Vector{} : load<Vector>(kept[row + r] + (first + v) * kLanes);
    for (std::int64_t unit = begin; unit < end; ++unit, w += kPanel * 4) {
        for (int v = 0; v < V * kLanes / 16; ++v) prefetch<R>(w + v * 64 + kAhead);
        Form::add(sums, w, x, unit * 4);
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) store(kept[row + r] + (first + v) * kLanes, sums[r][v]);
}

template <class Form, class Args>
static inline void by_units(const Args& args, std::int64_t part, std::int64_t parts) {
    using Vector = typename Form::Vector;
    const std::int64_t units = (args.k + Form::kInputs - 1) / Form::kInputs;
    const auto product = [&](std::int64_t panel, std::int64_t row0, std::int64_t rows) {
        alignas(64) std::int32_t kept[kBlockRows][kPanel];
        const std::int64_t step = rows <= kMost ? units : kSliceUnits;
        for (std::int64_t unit = 0; unit < units && rows > 1; unit += step) {
            const std::int64_t end = unit + step < units ? unit + step : units;
            for_chunks(0, rows, [&](auto count, std::int64_t row) {
                for (int v = 0; v < kVectors; v += kWide)
                    chunk<Form, decltype(count)::value, kWide>(args, unit, end, row0, row, panel, v, kept);
            });
        }
        if (rows == 1) chunk<Form, 1, kVectors>(args, 0, units, row0, 0, panel, 0, kept);
        for (std::int64_t row = 0; row < rows; ++row) {
            Vector sums[kVectors];
            for (int v = 0; v < kVectors; ++v) sums[v] = load<Vector>(kept[row] + v * kLanes);
            Form::finish(args, row0 + row, panel * kPanel, sums);
        }
    };
    for_panels(rows_of(args), args.n, units * 4, part, parts, product);
}

}  // namespace INFOPT_ISA
}  // namespace infopt
