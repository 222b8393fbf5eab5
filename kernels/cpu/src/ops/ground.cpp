#include "../simd.h"

namespace infopt {
namespace INFOPT_ISA {

static void count(const void* raw, std::int64_t part, std::int64_t parts) {
    const CountArgs& args = *static_cast<const CountArgs*>(raw);
    const Share share(args.n, 1, part, parts);
    for (std::int64_t i = share.begin; i < share.end; ++i) args.numbers[i] += 1;
}

static void read(const void* raw, std::int64_t part, std::int64_t parts) {
    typedef std::uint64_t v8 __attribute__((vector_size(8 * kLanes / 2)));
    constexpr int kWords = kLanes / 2;
    const ReadArgs& args = *static_cast<const ReadArgs*>(raw);
    const Share share(args.n, 8 * kWords, part, parts);
    v8 sums[8] = {};
    std::int64_t i = share.begin;
    for (; i + 8 * kWords <= share.end; i += 8 * kWords)
        for (int j = 0; j < 8; ++j) {
            prefetch<1>(args.words + i + j * kWords + 1024);
            sums[j] += load<v8>(args.words + i + j * kWords);
        }
    std::uint64_t total = 0;
    for (; i < share.end; ++i) total += args.words[i];
    for (int j = 1; j < 8; ++j) sums[0] += sums[j];
    for (int j = 0; j < kWords; ++j) total += sums[0][j];
    args.sums[part] = total;
}

extern const Entry ground_ops[] = {
    {"count", count, sizeof(CountArgs)},
    {"read", read, sizeof(ReadArgs)},
    {nullptr, nullptr, 0},
};

}  // namespace INFOPT_ISA
}  // namespace infopt
