// Products y = x W^T + b with weights that were packed in panels of 32 outputs.
//
// Within a panel inputs run in order, so that a product reads its weights from beginning to end,
// and all rows sum in the same order, however many there are: a row's result is the same to the
// last bit whatever rows stand beside it.
#pragma once

#include "ops.h"

namespace infopt {

// Outputs of a panel. A panel that is not full is filled up with zeros.
constexpr std::int64_t kPanel = 32;

// How many rows there are when an op is run.
template <class Args>
static inline std::int64_t rows_of(const Args& args) {
    return args.rows == nullptr ? args.m : *args.rows;
}

// linear_float32: weights float32 [ceil(n / 32), k, 32].
// linear_bfloat16: weights bfloat16 [ceil(n / 32), k / 2, 32, 2], k even; sums in float32.
struct DenseArgs {
    const void* x;        // [m, k], of the weights' type, rows x_stride apart
    const void* weight;
    const float* bias;    // [n], or null
    void* y;              // [m, n], of y_type, rows y_stride apart
    const std::int64_t* rows;  // where m is read when the op is run, or null
    std::int64_t m, n, k, x_stride, y_stride;
    std::int32_t y_type;  // kFloat32 or kBFloat16
    std::int32_t adds;    // to what y holds, which must be float32; 0: y is written
};

// gated_bfloat16: curve(gate) * up of a product with a bfloat16 weight of 2 n outputs, gates before
// ups, n a multiple of 32. Only with tiles.
struct GatedArgs {
    const void* x;             // [m, k] bfloat16, rows x_stride apart
    const void* weight;
    float* out;                // [m, n], or null
    bf16* rounded;             // a copy of it, or null; rows rounded_stride apart
    const std::int64_t* rows;  // where m is read when the op is run, or null
    std::int64_t m, n, k, x_stride, rounded_stride;
    std::int32_t curve;
};

// rows_float32, rows_bfloat16: rows of a weight packed as above, as they were.
struct RowsArgs {
    const void* weight;
    const std::int64_t* ids;   // [m], below n
    void* y;                   // [m, k], of y_type: the weights' type, or kFloat32
    const std::int64_t* rows;  // where m is read when the op is run, or null
    std::int64_t m, k;
    std::int32_t y_type;
};

// linear_groups: weights (code - zero) * scale, codes of 2, 3, 4 or 8 bits, one scale and zero for
// each `group` inputs of an output; group a multiple of 32 that divides k.
//
// Codes lie by blocks of 32 inputs: [ceil(n / 32), k / 32, 2 tiles, vectors, 16 outputs, 2], of
// 16-bit words, with as many vectors as a code has bits. A word belongs to one output, and to the
// even or the odd inputs, by its last place. Vectors of 2, 4 and 8 bits run through the inputs, a
// word's lowest bits first; 3 bits are two vectors of the lower two bits and one of the third.
// The inputs are not rounded: products of codes and inputs are exact, sums in float32.
struct GroupsArgs {
    const void* x;              // [m, k], of x_type, rows x_stride apart
    const std::uint16_t* codes;
    const void* scales;         // [ceil(n / 32), k / group, 32], of scale_type
    const std::uint8_t* zeros;  // the same shape, or null: all are `zero`
    const float* sums;          // with zeros: what group_sums says of x
    const float* bias;          // [n], or null
    void* y;                    // [m, n], of y_type, rows y_stride apart
    const std::int64_t* rows;   // where m is read when the op is run, or null
    std::int64_t m, n, k, group, x_stride, y_stride;
    std::int32_t x_type, y_type, scale_type;  // x and y: kFloat32 or kBFloat16
    std::int32_t bits, zero;
    std::int32_t adds;          // to what y holds, which must be float32; 0: y is written
};

// group_sums: sums float32 [m, k / group] of each group of a row's inputs.
struct GroupSumsArgs {
    const void* x;
    float* sums;
    const std::int64_t* rows;  // where m is read when the op is run, or null
    std::int64_t m, k, group, x_stride;
    std::int32_t x_type;
};

// quantize_rows: each row of x on a grid of integers, as bytes step + 128, and its scale: the
// largest magnitude / `largest`, or `fixed`; 1 where all is zero. A step is x / scale, rounded to
// the nearest, ties to even, within [-top, top - 1]. Of a row that is not finite the scale is NaN.
struct QuantizeArgs {
    const void* x;       // [m, k], of x_type, rows x_stride apart
    std::uint8_t* steps; // [m, k] and up to 3 more that hold anything, rows steps_stride apart
    float* scales;       // [m]
    const float* fixed;  // one scale for all, or null
    const std::int64_t* rows;
    std::int64_t m, k, x_stride, steps_stride;
    float largest;
    std::int32_t top, x_type;
};

// linear_int8: weights int8 [ceil(n / 32), ceil(k / 4), 32, 4], zeros where there are too many;
// y = (sum over inputs of step * code) * scale of the output * scale of the row + bias. Sums are
// exact: k is at most 65536.
struct Int8Args {
    const void* x;           // what quantize_rows made, rows x_stride apart
    const float* x_scales;   // [m]
    const void* weight;
    const float* scales;     // [n]
    const std::int32_t* ends; // [n]: 128 * the sum of an output's codes
    const float* bias;       // [n], or null
    void* y;                 // [m, n], of y_type, rows y_stride apart
    const std::int64_t* rows;
    std::int64_t m, n, k, x_stride, y_stride;
    std::int32_t y_type, adds;
};

}  // namespace infopt
