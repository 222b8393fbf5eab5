// One pool of threads that runs lists of calls: the ground of every op and of a whole step.
//
// A call is an op, its arguments, and into how many parts its work is cut. Threads take parts as
// they are free; a call begins when all parts of the one before are done. No thread needs to be
// present for a call to end: one that lost its core to a neighbour holds up a part at most, and
// only if it had taken one.
#pragma once

#include <cstdint>

namespace infopt {

// Does part `part` of `parts`. Results must not depend on `parts`, which is 1 with one thread.
using Op = void (*)(const void* args, std::int64_t part, std::int64_t parts);

struct Call {
    Op op;
    const void* args;
    std::int64_t parts;
    // What the calls behind this one read first: a thread that waits for others fetches it.
    const char* ahead;
    std::int64_t ahead_bytes;
};

// Runs the calls one after the other on up to `threads` threads, the caller's among them; returns
// when the last is done. One run at a time: a second caller waits.
void run(const Call* calls, std::int64_t count, int threads);

// The range [begin, end) of `count` things that is part `part` of `parts`, in whole `grain`s.
struct Share {
    std::int64_t begin, end;

    Share(std::int64_t count, std::int64_t grain, std::int64_t part, std::int64_t parts) {
        const std::int64_t grains = (count + grain - 1) / grain;
        begin = grains * part / parts * grain;
        end = grains * (part + 1) / parts * grain;
        if (end > count) end = count;
    }
};

}  // namespace infopt
