// Products of a few rows with a weight as a checkpoint has it, read once. A row is summed in the
// same order whatever rows stand beside it.
#include "../step.h"
#include "../wide.h"

namespace infopt {
namespace INFOPT_ISA {

constexpr std::int64_t kAhead = 1024;  // bytes

static inline vf numbers(const float* p) { return load<vf>(p); }
static inline vf numbers(const bf16* p) { return widen(load<vh>(p)); }
static inline float number(float x) { return x; }
static inline float number(bf16 x) { return to_float(x); }

// N outputs, whose weights lie in rows of their own, of M rows.
template <class T, int M, int N>
static inline void rows_of(const UnpackedArgs& a, int64_t row, int64_t output) {
    const T* w = static_cast<const T*>(a.weight) + output * a.inputs;
    const float* x = a.x + row * a.inputs;
    vf total[M][N] = {};
    int64_t k = 0;
    for (; k + 2 * W <= a.inputs; k += 2 * W)
        for (int n = 0; n < N; n++) {
            const T* at = w + n * a.inputs + k;
            prefetch<M>(reinterpret_cast<const char*>(at) + kAhead);
            const vf low = numbers(at), high = numbers(at + W);
            for (int m = 0; m < M; m++)
                total[m][n] += low * load<vf>(x + m * a.inputs + k) +
                               high * load<vf>(x + m * a.inputs + k + W);
        }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            float found = sum(total[m][n]);
            for (int64_t i = k; i < a.inputs; i++)
                found += number(w[n * a.inputs + i]) * x[m * a.inputs + i];
            a.y[(row + m) * a.y_stride + output + n] = a.bias ? found + a.bias[output + n] : found;
        }
}

// N vectors of outputs, whose weights lie side by side, of M rows.
template <class T, int M, int N>
static inline void columns_of(const UnpackedArgs& a, int64_t row, int64_t output) {
    const T* w = static_cast<const T*>(a.weight) + output;
    const float* x = a.x + row * a.inputs;
    vf total[M][N] = {};
    for (int64_t k = 0; k < a.inputs; k++) {
        const T* at = w + k * a.outputs;
        for (int n = 0; n < N; n++) {
            prefetch<M>(at + 4 * a.outputs + n * W);
            const vf own = numbers(at + n * W);
            for (int m = 0; m < M; m++) total[m][n] += x[m * a.inputs + k] * own;
        }
    }
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) {
            const int64_t at = output + n * W;
            const vf bias = a.bias ? load<vf>(a.bias + at) : vf{};
            store(a.y + (row + m) * a.y_stride + at, total[m][n] + bias);
        }
}

template <class T>
static inline void column_of(const UnpackedArgs& a, int64_t row, int64_t output) {
    const T* w = static_cast<const T*>(a.weight) + output;
    float found = 0;
    for (int64_t k = 0; k < a.inputs; k++)
        found += number(w[k * a.outputs]) * a.x[row * a.inputs + k];
    a.y[row * a.y_stride + output] = a.bias ? found + a.bias[output] : found;
}

template <class T, int M>
static void some_rows(const UnpackedArgs& a, int64_t row, int64_t from, int64_t to) {
    int64_t n = from;
    if (a.by_input) {
        for (; n + 4 * W <= to; n += 4 * W) columns_of<T, M, 4>(a, row, n);
        for (; n + W <= to; n += W) columns_of<T, M, 1>(a, row, n);
        for (; n < to; n++)
            for (int m = 0; m < M; m++) column_of<T>(a, row + m, n);
    } else {
        for (; n + 4 <= to; n += 4) rows_of<T, M, 4>(a, row, n);
        for (; n < to; n++) rows_of<T, M, 1>(a, row, n);
    }
}

template <class T>
static void outputs_of(const UnpackedArgs& a, int64_t from, int64_t to) {
    int64_t row = 0;
    for (; row + 4 <= *a.rows; row += 4) some_rows<T, 4>(a, row, from, to);
    switch (*a.rows - row) {
        case 3: return some_rows<T, 3>(a, row, from, to);
        case 2: return some_rows<T, 2>(a, row, from, to);
        case 1: return some_rows<T, 1>(a, row, from, to);
    }
}

static void unpacked(const void* given, int64_t part, int64_t parts) {
    const UnpackedArgs& a = *static_cast<const UnpackedArgs*>(given);
    const int64_t step = 4 * W;
    const Share own(a.outputs, step, part, parts);
    // All rows of some outputs before the next: their weights are then still in the cache.
    for (int64_t n = own.begin; n < own.end; n += step) {
        const int64_t end = n + step < own.end ? n + step : own.end;
        if (a.kind == BFLOAT16)
            outputs_of<bf16>(a, n, end);
        else
            outputs_of<float>(a, n, end);
    }
}

extern const Entry unpacked_ops[] = {
    {"unpacked", unpacked, sizeof(UnpackedArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
