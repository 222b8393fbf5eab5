// The C interface. INFOPT_HAS_AVX2, _AVX512 and _AMX say for which sets ops were compiled.
#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include <cstring>

#include "groups8.h"
#include "ops.h"
#include "step.h"

#define INFOPT_API extern "C" __attribute__((visibility("default")))

namespace {

using infopt::Entry;

// By number: 0 portable, 1 avx2, 2 avx512, 3 amx.
#define INFOPT_TABLES_OF(isa)                                                                    \
    const Entry* const isa##_tables[] = {                                                        \
        infopt::isa::ground_ops, infopt::isa::dense_ops, infopt::isa::groups_ops,                \
        infopt::isa::groups8_ops, infopt::isa::int8_ops, infopt::isa::elementwise_ops,           \
        infopt::isa::attention_ops, infopt::isa::unpacked_ops, infopt::isa::solve_ops, nullptr}
#define INFOPT_NO_TABLES_OF(isa) const Entry* const isa##_tables[] = {nullptr}

INFOPT_TABLES_OF(portable);
#ifdef INFOPT_HAS_AVX2
INFOPT_TABLES_OF(avx2);
#else
INFOPT_NO_TABLES_OF(avx2);
#endif
#ifdef INFOPT_HAS_AVX512
INFOPT_TABLES_OF(avx512);
#else
INFOPT_NO_TABLES_OF(avx512);
#endif
#ifdef INFOPT_HAS_AMX
INFOPT_TABLES_OF(amx);
#else
INFOPT_NO_TABLES_OF(amx);
#endif
constexpr int kSets = 4;
const Entry* const* const tables[kSets] = {portable_tables, avx2_tables, avx512_tables, amx_tables};

// Tiles are so large that Linux gives them only to a process that asks.
bool has_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr unsigned int kTile = 1u << 24, kInt8 = 1u << 25, kBFloat16 = 1u << 22;
    constexpr unsigned int kAll = kTile | kInt8 | kBFloat16;
    unsigned int a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kAll) != kAll) return false;
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
#else
    return false;
#endif
}

bool cpu_has(int isa) {
    if (isa == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 2)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
               __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
    if (isa == 3) return cpu_has(2) && has_tiles();
#endif
    return false;
}

}  // namespace

// Bit i: whether set i was compiled in (`infopt_compiled`), and this CPU has it (`infopt_usable`).
INFOPT_API int infopt_compiled() {
    int found = 0;
    for (int isa = 0; isa < kSets; ++isa) found |= (tables[isa][0] != nullptr) << isa;
    return found;
}

INFOPT_API int infopt_usable() {
    int found = 0;
    for (int isa = 0; isa < kSets; ++isa) found |= cpu_has(isa) << isa;
    return found & infopt_compiled();
}

// The op of that name for a set; null where there is none whose arguments are of that size.
INFOPT_API infopt::Op infopt_op(int isa, const char* name, std::int64_t args_size) {
    if (isa < 0 || isa >= kSets) return nullptr;
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
