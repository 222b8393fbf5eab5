// The ops: each does its share of the work, part p of n, on one set of instructions.
//
// Every file of ops/ is compiled once for each set (INFOPT_ISA names it), in a namespace of that
// name, and lists its ops in a table that library.cpp knows. Such a file must not use templates or
// inline functions of the C++ library: the linker keeps one copy of those, perhaps one with
// instructions that the CPU at hand lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#include "pool.h"

namespace infopt {

struct Entry {
    const char* name;
    Op op;
    std::size_t args_size;
};

// What is stored as 16-bit bfloat, and as which type a buffer is read or written.
using bf16 = std::uint16_t;
enum Type : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// A table ends with an entry without a name.
#define INFOPT_TABLES(isa) \
    namespace isa {        \
    extern const Entry ground_ops[]; \
    extern const Entry dense_ops[];  \
    extern const Entry groups_ops[]; \
    extern const Entry int8_ops[];   \
    }

INFOPT_TABLES(portable)
INFOPT_TABLES(avx2)
INFOPT_TABLES(avx512)
INFOPT_TABLES(amx)

// ops/ground.cpp

// count: numbers[i] += 1 for each i < n. For tests of the pool.
struct CountArgs {
    std::int32_t* numbers;
    std::int64_t n;
};

// read: sums[part] = the sum of the 64-bit words of its share; what reading memory costs.
struct ReadArgs {
    const std::uint64_t* words;
    std::int64_t n;
    std::uint64_t* sums;
};

}  // namespace infopt
