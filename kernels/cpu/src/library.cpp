// The C interface. INFOPT_HAS_AVX2, _AVX512 and _AMX say for which sets ops were compiled.
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "ops.h"
#include "step.h"

#define INFOPT_API extern "C" __attribute__((visibility("default")))

namespace {

using infopt::Entry;

#define INFOPT_ALL(isa)                                                                       \
    {infopt::isa::ground_ops,      infopt::isa::dense_ops,     infopt::isa::groups_ops,       \
     infopt::isa::int8_ops,        infopt::isa::elementwise_ops, infopt::isa::attention_ops,  \
     infopt::isa::unpacked_ops,    nullptr}

// By number: 0 portable, 1 avx2, 2 avx512, 3 amx.
constexpr int kSets = 4;
const Entry* const portable_tables[] = INFOPT_ALL(portable);
#ifdef INFOPT_HAS_AVX2
const Entry* const avx2_tables[] = INFOPT_ALL(avx2);
#else
const Entry* const avx2_tables[] = {nullptr};
#endif
#ifdef INFOPT_HAS_AVX512
const Entry* const avx512_tables[] = INFOPT_ALL(avx512);
#else
const Entry* const avx512_tables[] = {nullptr};
#endif
#ifdef INFOPT_HAS_AMX
const Entry* const amx_tables[] = INFOPT_ALL(amx);
#else
const Entry* const amx_tables[] = {nullptr};
#endif
const Entry* const* const tables[kSets] = {portable_tables, avx2_tables, avx512_tables, amx_tables};

#if defined(__x86_64__) && defined(__linux__)
// Whether there are tiles of bfloat16 and of integers, and the system lets this process use them:
// their state is so large that it wants to be asked, once for all threads.
bool asked_for_tiles() {
    constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr int kAsk = 0x1023, kData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const unsigned wanted = kBFloat16 | kTile | kInt8;
    return (d & wanted) == wanted && syscall(SYS_arch_prctl, kAsk, kData) == 0;
}

bool has_tiles() {
    static const bool found = asked_for_tiles();
    return found;
}
#else
bool has_tiles() { return false; }
#endif

bool cpu_has(int isa) {
    if (isa == 0) return true;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (isa == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == 3) return cpu_has(2) && has_tiles();
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
