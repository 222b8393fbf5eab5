// Products of inputs in 8 bits with 4-bit weights in groups, as plain structures, alike in Python
// (kernels/cpu/groups8.py).
#pragma once

#include "linear.h"

namespace infopt {

#define INFOPT_GROUPS8_TABLES(isa) \
    namespace isa {                \
    extern const Entry groups8_ops[]; \
    }
INFOPT_GROUPS8_TABLES(portable)
INFOPT_GROUPS8_TABLES(avx2)
INFOPT_GROUPS8_TABLES(avx512)
INFOPT_GROUPS8_TABLES(amx)

// group_steps: each group of a row of x as integers within [-127, 127], and its scale: the largest
// magnitude / 127; 1 where all is zero. Steps are rounded to the nearest, ties to even. Of a group
// that is not finite the scale is NaN. Eight inputs lie in the order 0 4 1 5 2 6 3 7: that in which
// the codes of a word are met, the lower half of its bytes first.
struct GroupStepsArgs {
    const void* x;       // [m, k], of x_type, rows x_stride apart
    std::int8_t* steps;  // [m, k], rows steps_stride apart
    float* scales;       // [m, k / group]
    std::int32_t* sums;  // [m, k / group], of the steps
    const std::int64_t* rows;  // where m is read when the op is run, or null
    std::int64_t m, k, group, x_stride, steps_stride;
    std::int32_t x_type;
};

// linear_groups8: codes of 4 bits, scales and zeros as GroupsArgs has them. A group's sum of steps
// and codes is exact; it is multiplied by both scales and summed in float32, group by group.
struct Groups8Args {
    const std::int8_t* x;          // what group_steps made, rows x_stride apart
    const float* x_scales;
    const std::int32_t* x_sums;
    const std::uint16_t* codes;
    const void* scales;
    const std::uint8_t* zeros;     // or null: all are `zero`
    const float* bias;             // [n], or null
    void* y;                       // [m, n], of y_type, rows y_stride apart
    const std::int64_t* rows;
    std::int64_t m, n, k, group, x_stride, y_stride;
    std::int32_t y_type, scale_type, zero;
    std::int32_t adds;             // to what y holds, which must be float32; 0: y is written
};

}  // namespace infopt
