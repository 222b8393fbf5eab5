// How a product is cut: into panels of outputs, blocks of rows, and chunks that registers hold.
#pragma once

#include "linear.h"
#include "simd.h"

namespace infopt {
namespace INFOPT_ISA {

// Vectors that make a panel, and those that are summed at a time where there is more than a row.
constexpr int kVectors = static_cast<int>(kPanel) / kLanes;
constexpr int kWide = 2;
// Rows to a chunk: with kWide vectors of outputs to each, as many sums as registers hold.
#if defined(__AVX512F__)
constexpr int kMost = 12;
#else
constexpr int kMost = 4;
#endif
// How far ahead weights are fetched, in bytes.
constexpr std::int64_t kAhead = 8192;
// Rows, and bytes of them, that stay in the second-level cache while panel after panel meets them.
constexpr std::int64_t kBlockRows = 20 * kMost;
constexpr std::int64_t kBlockBytes = 512 * 1024;

// Calls body(panel, first row, rows) for the share of blocks of `size` rows and panels.
template <class Body>
static inline void for_blocks(std::int64_t m, std::int64_t n, std::int64_t size, std::int64_t part,
                              std::int64_t parts, Body body) {
    const std::int64_t panels = (n + kPanel - 1) / kPanel;
    const std::int64_t blocks = (m + size - 1) / size;
    const Share share(blocks * panels, 1, part, parts);
    for (std::int64_t unit = share.begin; unit < share.end; ++unit) {
        const std::int64_t row = unit / panels * size;
        body(unit % panels, row, m - row < size ? m - row : size);
    }
}

// The same for blocks that the cache holds; a row has `row_bytes` bytes of inputs.
template <class Body>
static inline void for_panels(std::int64_t m, std::int64_t n, std::int64_t row_bytes,
                              std::int64_t part, std::int64_t parts, Body body) {
    std::int64_t size = kBlockBytes / row_bytes / kMost * kMost;
    size = size < 4 * kMost ? 4 * kMost : size > kBlockRows ? kBlockRows : size;
    for_blocks(m, n, size, part, parts, body);
}

template <int R>
struct Count {
    static constexpr int value = R;
};

// Calls body(Count<R>, first row) for rows in chunks of at most kMost, alike in size.
template <class Body>
static inline void for_chunks(std::int64_t row, std::int64_t rows, Body body) {
    const std::int64_t chunks = (rows + kMost - 1) / kMost;
    for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
        const std::int64_t begin = rows * chunk / chunks, size = rows * (chunk + 1) / chunks - begin;
        const std::int64_t first = row + begin;
        switch (size) {
            case 1: body(Count<1>{}, first); break;
            case 2: body(Count<2>{}, first); break;
            case 3: body(Count<3>{}, first); break;
            case 4: body(Count<4>{}, first); break;
#if defined(__AVX512F__)
            case 5: body(Count<5>{}, first); break;
            case 6: body(Count<6>{}, first); break;
            case 7: body(Count<7>{}, first); break;
            case 8: body(Count<8>{}, first); break;
            case 9: body(Count<9>{}, first); break;
            case 10: body(Count<10>{}, first); break;
            case 11: body(Count<11>{}, first); break;
            case 12: body(Count<12>{}, first); break;
#endif
        }
    }
}

// The same in fewer sizes, for bodies that are long: the largest that fits, then what is left.
template <class Body>
static inline void for_few_chunks(std::int64_t rows, Body body) {
    for (std::int64_t row = 0; row < rows;) {
        const std::int64_t left = rows - row;
        const std::int64_t size = left >= kMost ? kMost : left >= 8 ? 8 : left >= 4 ? 4 : left >= 2 ? 2 : 1;
        switch (size) {
            case 1: body(Count<1>{}, row); break;
            case 2: body(Count<2>{}, row); break;
            case 4: body(Count<4>{}, row); break;
#if defined(__AVX512F__)
            case 8: body(Count<8>{}, row); break;
            case 12: body(Count<12>{}, row); break;
#endif
        }
        row += size;
    }
}

// Base addresses of rows that lie `stride` bytes apart, three to a register.
template <int R>
struct RowAddresses {
    const char* base[(R + 2) / 3];
    std::int64_t stride;

    RowAddresses(const void* first, std::int64_t bytes) : stride(bytes) {
        for (int i = 0; i < (R + 2) / 3; ++i) base[i] = static_cast<const char*>(first) + 3 * i * bytes;
    }
    const char* at(int row, std::int64_t offset) const {
        return base[row / 3] + row % 3 * stride + offset;
    }
};

// What inputs are stored as.
struct Float32 {
    static constexpr std::int64_t kSize = 4;
    static float number(const char* at) {
        float value;
        std::memcpy(&value, at, 4);
        return value;
    }
};

struct BFloat16 {
    static constexpr std::int64_t kSize = 2;
    static float number(const char* at) {
        bf16 value;
        std::memcpy(&value, at, 2);
        return to_float(value);
    }
};

// Writes one row's outputs of a whole panel without anything to add.
static inline void put_whole(void* y, std::int64_t at, std::int32_t type, const vf* sums) {
    for (int v = 0; v < kVectors; ++v) {
        if (type == kFloat32)
            store(static_cast<float*>(y) + at + v * kLanes, sums[v]);
        else
            store(static_cast<bf16*>(y) + at + v * kLanes, narrow(sums[v]));
    }
}

// Writes one row's outputs of a panel, from output `at` on.
template <class Args>
static inline void put(const Args& args, std::int64_t row, std::int64_t at, const vf* sums) {
    if (args.n - at >= kPanel && args.bias == nullptr && args.adds == 0)
        return put_whole(args.y, row * args.y_stride + at, args.y_type, sums);
    alignas(64) float values[kPanel];
    const std::int64_t count = args.n - at < kPanel ? args.n - at : kPanel;
    for (int v = 0; v < kVectors; ++v) store(values + v * kLanes, sums[v]);
    if (args.bias != nullptr)
        for (std::int64_t i = 0; i < count; ++i) values[i] += args.bias[at + i];
    if (args.y_type == kFloat32) {
        float* y = static_cast<float*>(args.y) + row * args.y_stride + at;
        if (args.adds != 0)
            for (std::int64_t i = 0; i < count; ++i) values[i] += y[i];
        std::memcpy(y, values, sizeof(float) * count);
        return;
    }
    alignas(64) bf16 rounded[kPanel];
    for (int v = 0; v < kVectors; ++v) store(rounded + v * kLanes, narrow(load<vf>(values + v * kLanes)));
    std::memcpy(static_cast<bf16*>(args.y) + row * args.y_stride + at, rounded, sizeof(bf16) * count);
}

}  // namespace INFOPT_ISA
}  // namespace infopt
