// The arguments of ops/solve.cpp: rounding weights, where each error moves the columns behind it.
#pragma once

#include <cstdint>

namespace infopt {

// gptq_columns: rounds `count` neighbouring columns one after the other, each corrected for the
// errors of those before it. Every [count, n] lies row by row: row i is the column i of a weight.
struct ColumnsSolveArgs {
    float* columns;              // [count, n]; changed to what was rounded in the end
    const float* factor;         // [count, count]; its upper triangle
    const float* shift;          // of the same form: what a column adds to those behind it; or null
    const float* scales;         // [groups, n]
    const float* zeros;          // [groups, n]
    const std::int64_t* groups;  // [count]: whose scales are a column's
    const std::uint8_t* held;    // [count, n]: 1 where a weight is 0 and stays so; or null
    float* codes;                // [count, n]
    float* errors;               // [count, n]: over the factor's diagonal
    std::int64_t n, count;
    std::int64_t factor_strides[2], shift_strides[2];  // from row to row, from column to column
    float max_code;
};

// grid_errors: the squared error of rounding each group of weights on each of several grids.
struct GridErrorsArgs {
    const float* weights;  // [groups, width]
    const float* scales;   // [grids, groups]
    const float* zeros;    // [grids, groups]
    float* errors;         // [grids, groups]
    std::int64_t groups, width, grids;
    float max_code;
};

}  // namespace infopt
