// What the operations of a decode step need, as plain structures, alike in Python (kernels/cpu/step.py).
//
// Numbers between operations are float32. `rows` points at how many rows there are now, which is
// read when an operation runs. An operation is split over threads that wait for each other after
// it; what is computed of a row depends on that row alone.
#pragma once

#include "ops.h"

namespace infopt {

using std::int32_t;
using std::int64_t;

#define INFOPT_STEP_TABLES(isa)              \
    namespace isa {                          \
    extern const Entry elementwise_ops[];    \
    extern const Entry attention_ops[];      \
    extern const Entry unpacked_ops[];          \
    }
INFOPT_STEP_TABLES(portable)
INFOPT_STEP_TABLES(avx2)
INFOPT_STEP_TABLES(avx512)
INFOPT_STEP_TABLES(amx)

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Curve : int32_t { SILU = 0, RELU = 1, GELU = 2, GELU_TANH = 3 };

struct EmbedArgs {
    const int64_t* rows, *ids;
    const void* table;  // [vocabulary, width]
    float* x;           // [rows, width]
    int64_t width;
    float scale;
    int32_t kind;
    int32_t adds;  // to what is in x
};

struct RoundArgs {
    const int64_t* rows;
    const float* x;  // [rows, width]
    bf16* rounded;   // rows rounded_stride apart
    int64_t rounded_stride, width;
};

struct ColumnsArgs {
    const int64_t* rows;
    const float* x;  // [rows, width]
    const int32_t* columns;
    float* out;      // [rows, width], the columns in this order
    bf16* rounded;   // a copy of it, or null; rows rounded_stride apart
    int64_t rounded_stride, width;
};

struct NormArgs {
    const int64_t* rows;
    float* x;             // [rows, width]; `added` is added to it first
    const float* added;   // or null
    const float* weight;  // [width]
    const float* bias;    // of a LayerNorm; null for an RMSNorm
    float* out;           // may be x
    bf16* rounded;        // a copy of it, or null; rows rounded_stride apart
    int64_t rounded_stride;
    int64_t width;
    float eps;
};

struct AddArgs {
    const int64_t* rows;
    float* x;
    const float* added;
    int64_t width;
};

struct AnglesArgs {
    const int64_t* rows, *positions;
    const float* frequencies;  // [half]
    float* cos, *sin;          // [rows, half]
    int64_t half;
    float magnitude;
};

struct CacheArgs {  // rotates queries and keys in place, and writes keys and values
    const int64_t* rows, *slots;
    float* qkv;             // [rows, heads + 2 kv_heads, head_dim]
    const float* cos, *sin;  // [rows, half], or null
    const float* weight;    // of a norm of each head, [heads + kv_heads, head_dim], or null
    void* cache;            // [slots, 2, kv_heads, row]
    const float* scales;    // of a cache in 8 bits, calibrated, [2 kv_heads]; or null
    int64_t heads, kv_heads, head_dim, half, row_bytes;
    float eps;
    int32_t kind;
};

struct AttendArgs {
    const int64_t* rows;
    const float* qkv;
    const void* cache;
    const int64_t* positions;
    const int32_t* owners;  // [rows]: whose row of `tables` is a row's
    const int32_t* tables;  // [requests, width]
    float* out;             // [rows, heads, head_dim]
    float* parts;           // [rows not in chunks, kv_heads, splits, group, padded head_dim + 2]
    int32_t* done;          // [rows not in chunks, kv_heads], zeros, and so again afterwards
    bf16* rounded;          // a copy of out, or null; rows rounded_stride apart
    int64_t rounded_stride;
    int64_t heads, kv_heads, head_dim, row_bytes, block_size, width, splits;
    int64_t window;  // or 0
    float scale, cap;  // cap: or 0
    int32_t kind;
};

struct GateArgs {
    const int64_t* rows;
    const float* x;  // [rows, 2 inner], gate before up; [rows, inner] where not gated
    float* out;      // [rows, inner]
    bf16* rounded;   // a copy of it, or null; rows rounded_stride apart
    int64_t rounded_stride;
    int64_t inner;
    int32_t curve, gated;
};

struct CapArgs {
    const int64_t* rows;
    float* x;
    int64_t width;
    float cap;
};

// y = x W^T + b for a few rows, from a weight as it lies in a checkpoint.
struct UnpackedArgs {
    const int64_t* rows;
    const float* x;      // [rows, inputs]
    const void* weight;  // [outputs, inputs], or [inputs, outputs]
    const float* bias;   // or null
    float* y;            // [rows, outputs], rows y_stride apart
    int64_t inputs, outputs, y_stride;
    int32_t kind;
    int32_t by_input;  // the latter
};

}  // namespace infopt
