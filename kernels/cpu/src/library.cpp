// The C interface. INFOPT_HAS_AVX2 and INFOPT_HAS_AVX512 say for which sets ops were compiled.
#include <cstring>

#include "groups8.h"
#include "ops.h"
#include "step.h"

#define INFOPT_API extern "C" __attribute__((visibility("default")))

namespace {

using infopt::Entry;

// By number: 0 portable, 1 avx2, 2 avx512.
const Entry* const portable_tables[] = {infopt::portable::ground_ops, infopt::portable::dense_ops,
    infopt::portable::groups_ops, infopt::portable::groups8_ops, infopt::portable::int8_ops,
    infopt::portable::elementwise_ops, infopt::portable::attention_ops, infopt::portable::unpacked_ops, nullptr};
#ifdef INFOPT_HAS_AVX2
const Entry* const avx2_tables[] = {infopt::avx2::ground_ops, infopt::avx2::dense_ops,
    infopt::avx2::groups_ops, infopt::avx2::groups8_ops, infopt::avx2::int8_ops,
    infopt::avx2::elementwise_ops, infopt::avx2::attention_ops, infopt::avx2::unpacked_ops, nullptr};
#else
const Entry* const avx2_tables[] = {nullptr};
#endif
#ifdef INFOPT_HAS_AVX512
const Entry* const avx512_tables[] = {infopt::avx512::ground_ops, infopt::avx512::dense_ops,
    infopt::avx512::groups_ops, infopt::avx512::groups8_ops, infopt::avx512::int8_ops,
    infopt::avx512::elementwise_ops, infopt::avx512::attention_ops, infopt::avx512::unpacked_ops, nullptr};
#else
const Entry* const avx512_tables[] = {nullptr};
#endif
const Entry* const* const tables[] = {portable_tables, avx2_tables, avx512_tables};

bool cpu_has(int isa) {
    if (isa == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
#endif
    return false;
}

}  // namespace

// Bit i: whether set i was compiled in (`infopt_compiled`), and this CPU has it (`infopt_usable`).
INFOPT_API int infopt_compiled() {
    int found = 0;
    for (int isa = 0; isa < 3; ++isa) found |= (tables[isa][0] != nullptr) << isa;
    return found;
}

INFOPT_API int infopt_usable() {
    int found = 0;
    for (int isa = 0; isa < 3; ++isa) found |= cpu_has(isa) << isa;
    return found & infopt_compiled();
}

// The op of that name for a set; null where there is none whose arguments are of that size.
INFOPT_API infopt::Op infopt_op(int isa, const char* name, std::int64_t args_size) {
    if (isa < 0 || isa > 2) return nullptr;
    for (const Entry* const* table = tables[isa]; *table != nullptr; ++table)
        for (const Entry* entry = *table; entry->name != nullptr; ++entry)
            if (std::strcmp(entry->name, name) == 0)
                return entry->args_size == static_cast<std::size_t>(args_size) ? entry->op : nullptr;
    return nullptr;
}

// What `infopt_run` takes a call to be: a caller that was made with another would be misread.
INFOPT_API std::int64_t infopt_call_bytes() { return sizeof(infopt::Call); }

INFOPT_API void infopt_run(const infopt::Call* calls, std::int64_t count, int threads) {
    infopt::run(calls, count, threads);
}
