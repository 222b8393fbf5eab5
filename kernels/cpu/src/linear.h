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

// linear_float32: weights float32 [ceil(n / 32), k, 32].
// linear_bfloat16: weights bfloat16 [ceil(n / 32), k / 2, 32, 2], k even; sums in float32.
struct DenseArgs {
    const void* x;        // [m, k], of the weights' type, rows x_stride apart
    const void* weight;
    const float* bias;    // [n], or null
    void* y;              // [m, n], of y_type, rows y_stride apart
    std::int64_t m, n, k, x_stride, y_stride;
    std::int32_t y_type;  // kFloat32 or kBFloat16
};

// rows_float32, rows_bfloat16: rows of a weight packed as above, as they were.
struct RowsArgs {
    const void* weight;
    const std::int64_t* ids;  // [m], below n
    void* y;                  // [m, k], of the weights' type
    std::int64_t m, k;
};

}  // namespace infopt
