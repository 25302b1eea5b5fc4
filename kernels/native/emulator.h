// A CUDA block on a CPU, for tests: the text of device sources compiled by a host compiler.
//
// Every thread of a block is a fiber; one runs until it waits at a barrier or a collective of its warp.  Blocks run one
// after another.  What a GPU leaves to chance is made to differ, so that what relies on it gives other numbers: threads
// and blocks go in the order asked for (emulator_order), a warp goes far ahead of others, shared memory starts as NaN,
// background copies arrive when they are waited for and not before.  What would hang or fault there ends with a message: a barrier that not all
// threads reach, lanes of a warp in different collectives, an address that is not aligned.
//
// It shows nothing about speed, and of a GPU's arithmetic only what is IEEE: exponentials and the order of the sums in
// a matrix product are the CPU's.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__ __restrict

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- functions of the device ---------------------------------------------------------------------------------------

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float __int_as_float(int32_t bits) { return __uint_as_float(static_cast<uint32_t>(bits)); }
inline int32_t __float_as_int(float x) { return static_cast<int32_t>(__float_as_uint(x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return 1.0f / std::sqrt(x); }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __popcll(uint64_t x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline uint32_t __umulhi(uint32_t x, uint32_t y) { return static_cast<uint32_t>((static_cast<uint64_t>(x) * y) >> 32); }
template <class T>
T __ldg(const T* from) {
    return *from;
}
using std::max;
using std::min;

namespace farspan {
namespace emulator {

// ---- numbers of 16 bits ---------------------------------------------------------------------------------------------

inline uint16_t bfloat_of_float(float x) {
    uint32_t bits = __float_as_uint(x);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of_half(uint16_t bits) {
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, fraction = bits & 0x3ffu;
    if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | fraction << 13);
    if (exponent != 0) return __uint_as_float(sign | (exponent + 112) << 23 | fraction << 13);
    return __uint_as_float(sign | __float_as_uint(static_cast<float>(fraction) * 0x1p-24f));
}

inline uint16_t half_of_float(float x) {
    const uint32_t bits = __float_as_uint(x);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const float size = std::fabs(x);
    if (std::isnan(x)) return 0x7fff;
    if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00u);
    if (size < std::ldexp(1.0f, -14)) {  // subnormal: multiples of 2^-24
        return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(size, 24))));
    }
    uint32_t rest = bits & 0x7fffffffu;
    rest += 0xfffu + ((rest >> 13) & 1u);
    return static_cast<uint16_t>(sign | static_cast<uint16_t>((rest - (112u << 23)) >> 13));
}

// ---- fibers ---------------------------------------------------------------------------------------------------------

constexpr size_t STACK = 128 * 1024;

#if defined(__x86_64__)
// What a called function must keep, and the stack.
__attribute__((naked, noinline)) inline void switch_stacks(void** /*save*/, void* /*to*/) {
    asm volatile(
        "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
        "movq %rsp, (%rdi)\n movq %rsi, %rsp\n"
        "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n ret\n");
}
#endif

enum Operation : int { SHUFFLE, SHUFFLE_XOR, SHUFFLE_UP, SHUFFLE_DOWN, BALLOT, MMA, MMA_TF32, LOAD_MATRICES,
                       LOAD_MATRICES_TRANSPOSED, SYNC_WARP };
inline const char* name_of(Operation operation) {
    static const char* const names[] = {"shuffle", "shuffle_xor", "shuffle_up", "shuffle_down", "ballot", "mma",
                                        "mma_tf32", "load_matrices", "load_matrices_transposed", "sync_warp"};
    return names[operation];
}

struct Copy {
    void* to;
    const void* from;
    bool valid;
};

struct Fiber {
    std::unique_ptr<char[]> stack{new char[STACK]};
#if defined(__x86_64__)
    void* context = nullptr;
#else
    ucontext_t context;
#endif
    dim3 thread;
    enum { READY, AT_WARP, AT_BLOCK, DONE } state = DONE;
    std::vector<std::vector<Copy>> copies;  // groups, the last one open
};

struct Warp {
    static constexpr size_t SLOT = 128;  // bytes that a lane can give
    alignas(16) char slots[2][32 * SLOT];
    int arrived = 0, phase = 0;
    Operation operation = SYNC_WARP;
    size_t size = 0;
};

struct Machine {
    std::mutex mutex;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::vector<char> shared;
    char* shared_start = nullptr;
    size_t threads = 0, waiting_at_block = 0, done = 0;
    int current = -1;
    dim3 block, block_size, grid;
    void (*body)(void*) = nullptr;
    void* body_data = nullptr;
    std::string error;
    uint64_t order = 0, random = 0;
#if defined(__x86_64__)
    void* context = nullptr;
#else
    ucontext_t context;
#endif
};
inline Machine& machine() {
    static Machine it;
    return it;
}
inline Fiber& current() { return machine().fibers[static_cast<size_t>(machine().current)]; }

inline void resume(int fiber) {
    Machine& m = machine();
    m.current = fiber;
#if defined(__x86_64__)
    switch_stacks(&m.context, m.fibers[static_cast<size_t>(fiber)].context);
#else
    swapcontext(&m.context, &m.fibers[static_cast<size_t>(fiber)].context);
#endif
}
inline void leave() {
    Machine& m = machine();
#if defined(__x86_64__)
    switch_stacks(&current().context, m.context);
#else
    swapcontext(&current().context, &m.context);
#endif
}

// Ends the launch with a message; the fibers are abandoned where they are (device code owns nothing).
[[noreturn]] inline void fail(const std::string& text) {
    Machine& m = machine();
    const Fiber& f = current();
    m.error = text + " (block " + std::to_string(m.block.x) + "," + std::to_string(m.block.y) + "," +
              std::to_string(m.block.z) + ", thread " + std::to_string(f.thread.x) + ")";
    for (;;) leave();
}

inline void require_aligned(const void* address, size_t size, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % size) {
        fail(std::string(what) + " of " + std::to_string(size) + " bytes from an address that is no multiple of it");
    }
}

inline void fiber_main() {
    Machine& m = machine();
    m.body(m.body_data);
    current().state = Fiber::DONE;
    ++m.done;
    for (;;) leave();
}

inline void prepare(Fiber& f) {
    f.state = Fiber::READY;
    f.copies.assign(1, {});
#if defined(__x86_64__)
    uintptr_t top = (reinterpret_cast<uintptr_t>(f.stack.get()) + STACK) & ~uintptr_t{15};
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;  // a function finds its stack 8 off a multiple of 16
    *--at = reinterpret_cast<void*>(&fiber_main);
    for (int i = 0; i < 6; ++i) *--at = nullptr;
    f.context = at;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack.get();
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
}

// ---- barriers, collectives of a warp --------------------------------------------------------------------------------

inline void sync_block() {
    Machine& m = machine();
    current().state = Fiber::AT_BLOCK;
    if (++m.waiting_at_block == m.threads) {
        m.waiting_at_block = 0;
        for (Fiber& f : m.fibers) {
            if (f.state == Fiber::AT_BLOCK) f.state = Fiber::READY;
        }
    }
    leave();
}

// What every lane of the warp gives; valid until the lane's next collective but one.
template <class T>
const T* gather(T value, Operation operation) {
    static_assert(sizeof(T) <= Warp::SLOT, "a lane gives at most 128 bytes");
    Machine& m = machine();
    const int index = m.current / 32, lane = m.current % 32;
    Warp& w = m.warps[static_cast<size_t>(index)];
    if (w.arrived == 0) {
        w.operation = operation;
        w.size = sizeof(T);
    } else if (w.operation != operation || w.size != sizeof(T)) {
        fail(std::string("lanes of a warp are in different collectives: ") + name_of(w.operation) + " and " +
             name_of(operation));
    }
    T* slots = reinterpret_cast<T*>(w.slots[w.phase]);
    slots[lane] = value;
    current().state = Fiber::AT_WARP;
    if (++w.arrived == 32) {
        w.arrived = 0;
        w.phase ^= 1;
        for (int i = 0; i < 32; ++i) m.fibers[static_cast<size_t>(index * 32 + i)].state = Fiber::READY;
    }
    leave();
    return slots;
}
inline void sync_warp() { gather(0, SYNC_WARP); }

inline char* shared_memory() { return machine().shared_start; }

// ---- background copies ----------------------------------------------------------------------------------------------

inline void copy_16(void* to, const void* from, bool valid) {
    require_aligned(to, 16, "copy_16");
    if (valid) require_aligned(from, 16, "copy_16");
    current().copies.back().push_back({to, from, valid});
}
inline void copies_commit() { current().copies.emplace_back(); }
inline void copies_wait(int pending) {
    auto& groups = current().copies;
    const int finished = static_cast<int>(groups.size()) - 1 - pending;
    for (int i = 0; i < finished; ++i) {
        for (const Copy& copy : groups[static_cast<size_t>(i)]) {
            if (copy.valid) {
                std::memcpy(copy.to, copy.from, 16);
            } else {
                std::memset(copy.to, 0, 16);
            }
        }
    }
    if (finished > 0) groups.erase(groups.begin(), groups.begin() + finished);
}

// ---- launching ------------------------------------------------------------------------------------------------------

// Moves on to another number of the generator SplitMix64.
inline uint64_t next_random() {
    uint64_t x = machine().random += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

// 0: first to last, 1: last to first, others: shuffled, differently for each.
inline void put_in_order(std::vector<int>& items) {
    const uint64_t order = machine().order;
    if (order == 1) std::reverse(items.begin(), items.end());
    if (order > 1) {
        for (size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[next_random() % i]);
    }
}

inline const char* describe_wait(const Fiber& f) {
    return f.state == Fiber::AT_BLOCK ? "at sync_block" : "in a collective of its warp";
}

inline bool run_block() {
    Machine& m = machine();
    std::memset(m.shared_start, 0xff, m.shared.size() - 128);
    for (Warp& w : m.warps) w.arrived = w.phase = 0;
    m.waiting_at_block = m.done = 0;
    for (size_t i = 0; i < m.threads; ++i) {
        const unsigned n = static_cast<unsigned>(i);
        m.fibers[i].thread = {n % m.block_size.x, n / m.block_size.x % m.block_size.y,
                              n / (m.block_size.x * m.block_size.y)};
        prepare(m.fibers[i]);
    }
    std::vector<int> ready;
    while (m.done < m.threads) {
        ready.clear();
        for (size_t i = 0; i < m.threads; ++i) {
            if (m.fibers[i].state == Fiber::READY) ready.push_back(static_cast<int>(i));
        }
        if (ready.empty()) {
            size_t stuck = 0;  // rather one of a warp whose other lanes went elsewhere
            for (size_t i = 0; i < m.threads; ++i) {
                if (m.fibers[stuck].state == Fiber::DONE) stuck = i;
                if (m.fibers[i].state == Fiber::AT_WARP) {
                    stuck = i;
                    break;
                }
            }
            m.error = "threads wait for ever: block " + std::to_string(m.block.x) + "," + std::to_string(m.block.y) +
                      "," + std::to_string(m.block.z) + ", thread " + std::to_string(stuck) + " " +
                      describe_wait(m.fibers[stuck]) + ", " + std::to_string(m.done) + " of " +
                      std::to_string(m.threads) + " have ended";
            return false;
        }
        put_in_order(ready);
        // One warp goes on as far as it can, or some chosen at random: in step, none would miss a barrier.
        const int first = ready[0] / 32;
        const uint64_t ahead = m.order > 1 ? next_random() & next_random() : 0;
        for (int i : ready) {
            if (i / 32 != first && !(ahead >> i / 32 & 1)) continue;
            resume(i);
            if (!m.error.empty()) return false;
        }
    }
    return true;
}

constexpr int INVALID = 1, FAILED = 999;

template <class F>
int launch(dim3 grid, dim3 block, size_t shared, F body) {
    Machine& m = machine();
    std::lock_guard<std::mutex> lock(m.mutex);
    m.error.clear();
    m.threads = static_cast<size_t>(block.x) * block.y * block.z;
    if (m.threads == 0 || m.threads > 1024 || m.threads % 32 || shared > 227 * 1024 || grid.y > 65535 || grid.z > 65535) {
        m.error = "a launch of " + std::to_string(m.threads) + " threads, " + std::to_string(shared) +
                  " bytes of shared memory: 32 to 1024 threads in whole warps, at most 227 KiB and 65535 blocks in y, z";
        return INVALID;
    }
    if (m.fibers.size() < m.threads) m.fibers = std::vector<Fiber>(m.threads);
    for (size_t i = m.threads; i < m.fibers.size(); ++i) m.fibers[i].state = Fiber::DONE;
    m.warps = std::vector<Warp>(m.threads / 32);
    m.shared.assign(shared + 256, 0);
    m.shared_start = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(m.shared.data()) + 127) & ~uintptr_t{127});
    m.block_size = block;
    m.grid = grid;
    m.random = m.order;
    m.body = [](void* data) { (*static_cast<F*>(data))(); };
    m.body_data = &body;

    std::vector<int> blocks(static_cast<size_t>(grid.x) * grid.y * grid.z);
    for (size_t i = 0; i < blocks.size(); ++i) blocks[i] = static_cast<int>(i);
    put_in_order(blocks);
    for (int i : blocks) {
        const unsigned n = static_cast<unsigned>(i);
        m.block = {n % grid.x, n / grid.x % grid.y, n / (grid.x * grid.y)};
        if (!run_block()) return FAILED;
    }
    return 0;
}

inline const char* message(int code) {
    const std::string& error = machine().error;
    return code == INVALID && error.empty() ? "invalid value" : error.c_str();
}

}  // namespace emulator
}  // namespace farspan

#define threadIdx (farspan::emulator::current().thread)
#define blockIdx (farspan::emulator::machine().block)
#define blockDim (farspan::emulator::machine().block_size)
#define gridDim (farspan::emulator::machine().grid)

// The order that threads and blocks run in, from the next launch on: see put_in_order.
extern "C" inline __attribute__((used, visibility("default"))) void emulator_order(uint64_t order) {
    farspan::emulator::machine().order = order;
}
