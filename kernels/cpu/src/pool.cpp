#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace infopt {
namespace {

// About 20 us: longer than between two calls of a step, shorter than what a neighbour would miss.
constexpr int kSpins = 1000;
constexpr std::int64_t kMostParts = 0xFFFF;
// What is fetched between two looks at the state, and at most: no more than stays in a cache.
constexpr std::int64_t kFetched = 1024, kMostFetched = 384 * 1024;

// What a waiting thread fetches: addresses only, which are never read, so that they may be gone.
struct Ahead {
    const char* begin = nullptr;
    std::int64_t done = 0, bytes = 0;

    void meet(const Call& call) {
        if (call.ahead == begin) return;
        begin = call.ahead, done = 0;
        bytes = call.ahead_bytes < kMostFetched ? call.ahead_bytes : kMostFetched;
    }

    bool fetch() {
        if (done >= bytes) return false;
        for (std::int64_t i = 0; i < kFetched; i += 64) __builtin_prefetch(begin + done + i, 0, 2);
        done += kFetched;
        return true;
    }
};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

class Pool {
  public:
    ~Pool() {
        {
            std::lock_guard<std::mutex> running(running_);
            std::lock_guard<std::mutex> lock(mutex_);
            stop_ = true;
        }
        bell_.notify_all();
        wanted_.notify_all();
        for (std::thread& worker : workers_) worker.join();
    }

    void run(const Call* calls, std::int64_t count, int threads) {
        std::lock_guard<std::mutex> running(running_);
        grow(threads - 1);
        calls_ = calls;
        count_ = static_cast<std::uint32_t>(count);
        first_ = epoch(state_.load(std::memory_order_relaxed)) + 1;
        want(threads - 1);
        publish(0);
        Ahead ahead;
        for (;;) {
            if (take_part(ahead)) continue;
            const std::uint64_t seen = state_.load(std::memory_order_acquire);
            if (next(seen) < parts(seen)) continue;
            if (epoch(seen) - first_ == count_) break;
            wait(seen, ahead);
        }
    }

  private:
    // The state is one word: which call (32 bits), its next part (16), its parts (16). A part is
    // taken by raising the second; that succeeds only while the call is running, so that what a
    // thread then reads of the run is still there.
    static std::uint32_t epoch(std::uint64_t state) { return static_cast<std::uint32_t>(state >> 32); }
    static std::uint32_t next(std::uint64_t state) { return (state >> 16) & 0xFFFF; }
    static std::uint32_t parts(std::uint64_t state) { return state & 0xFFFF; }

    bool take_part(Ahead& ahead) {
        std::uint64_t seen = state_.load(std::memory_order_acquire);
        while (next(seen) < parts(seen)) {
            if (!state_.compare_exchange_weak(seen, seen + (1u << 16), std::memory_order_acq_rel,
                                              std::memory_order_acquire))
                continue;
            const std::uint32_t index = epoch(seen) - first_;
            const Call& call = calls_[index];
            ahead.meet(call);
            call.op(call.args, next(seen), parts(seen));
            if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == parts(seen)) publish(index + 1);
            return true;
        }
        return false;
    }

    void publish(std::uint32_t index) {
        done_.store(0, std::memory_order_relaxed);
        std::uint64_t count = 0;
        if (index < count_) {
            const std::int64_t wanted = calls_[index].parts;
            count = static_cast<std::uint64_t>(wanted < 1 ? 1 : wanted > kMostParts ? kMostParts : wanted);
        }
        state_.store(static_cast<std::uint64_t>(first_ + index) << 32 | count, std::memory_order_seq_cst);
        // A single part is done by whoever is here; the end must be told to the caller.
        if (count != 1 && sleepers_.load(std::memory_order_seq_cst) > 0) {
            { std::lock_guard<std::mutex> lock(mutex_); }
            bell_.notify_all();
        }
    }

    void wait(std::uint64_t seen, Ahead& ahead) {
        while (state_.load(std::memory_order_acquire) == seen && ahead.fetch()) {
        }
        for (int spin = 0; spin < kSpins; ++spin) {
            if (state_.load(std::memory_order_acquire) != seen) return;
            relax();
        }
        std::unique_lock<std::mutex> lock(mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        bell_.wait(lock, [&] { return stop_ || state_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }

    void want(int workers) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            const bool more = workers > limit_;
            limit_ = workers;
            if (!more) return;
        }
        wanted_.notify_all();
    }

    void work(int id) {
        Ahead ahead;
        for (;;) {
            const std::uint64_t seen = state_.load(std::memory_order_acquire);
            if (take_part(ahead)) continue;
            wait(seen, ahead);
            std::unique_lock<std::mutex> lock(mutex_);
            wanted_.wait(lock, [&] { return stop_ || id < limit_; });
            if (stop_) return;
        }
    }

    void grow(int workers) {
        try {
            while (static_cast<int>(workers_.size()) < workers) {
                const int id = static_cast<int>(workers_.size());
                workers_.emplace_back([this, id] { work(id); });
            }
        } catch (const std::system_error&) {
            // No more threads to be had: those that are there take all parts.
        }
    }

    alignas(64) std::atomic<std::uint64_t> state_{0};
    alignas(64) std::atomic<std::uint32_t> done_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    const Call* calls_ = nullptr;
    std::uint32_t first_ = 0, count_ = 0;
    int limit_ = 0;
    bool stop_ = false;
    std::mutex running_, mutex_;
    std::condition_variable bell_, wanted_;
    std::vector<std::thread> workers_;
};

Pool* the_pool = nullptr;
std::mutex creating;

// In a forked child no worker lives on, and a lock may be held by one that does not: it starts
// anew, and what the parent's pool held is left where it is.
void forget_pool() {
    the_pool = nullptr;
    new (&creating) std::mutex;
}

Pool& pool() {
    std::lock_guard<std::mutex> lock(creating);
    static const int registered = pthread_atfork(nullptr, nullptr, forget_pool);
    (void)registered;
    if (the_pool == nullptr) the_pool = new Pool;
    return *the_pool;
}

struct AtExit {
    ~AtExit() {
        delete the_pool;
        the_pool = nullptr;
    }
} at_exit;

}  // namespace

void run(const Call* calls, std::int64_t count, int threads) {
    bool alone = true;
    if (threads > 1)
        for (std::int64_t i = 0; i < count && alone; ++i) alone = calls[i].parts <= 1;
    if (alone) {
        for (std::int64_t i = 0; i < count; ++i) calls[i].op(calls[i].args, 0, 1);
        return;
    }
    pool().run(calls, count, threads);
}

}  // namespace infopt
