// CUDA C++ on a CPU, for tests: a fiber for each thread of a block, one block after the other.
//
// A thread runs until it waits: __syncthreads() waits for all threads of the block, a shuffle for those of the warp. So
// a missing barrier shows in some order of the threads, which the launch chooses: forward, reversed or random, where a
// warp may run far ahead of the others. A barrier that not all threads reach is an error, as is a write behind the launch's shared memory. Shared memory is filled with
// NaN before each block.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__

struct dim3 { unsigned x = 1, y = 1, z = 1; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
struct __half { _Float16 value; };

inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half(float f) { return {static_cast<_Float16>(f)}; }
template <class To, class From> To shim_bits(From from) { To to; std::memcpy(&to, &from, sizeof to); return to; }
inline __half __ushort_as_half(unsigned short bits) { return shim_bits<__half>(bits); }
inline unsigned short __half_as_ushort(__half h) { return shim_bits<unsigned short>(h); }
inline float __uint_as_float(unsigned bits) { return shim_bits<float>(bits); }
inline unsigned __float_as_uint(float f) { return shim_bits<unsigned>(f); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= static_cast<unsigned>(bytes >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return result;
}

constexpr std::size_t SHIM_SHARED = 48 << 10, SHIM_GUARD = 1024;
extern float4 shared_memory[];
float4 shared_memory[(SHIM_SHARED + SHIM_GUARD) / sizeof(float4)];
dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int LANES = 32;
constexpr std::size_t STACK = 256 << 10;
enum Status { RUNS, WAITS_BLOCK, WAITS_WARP, DONE };
enum Fault { FINE = 0, DEADLOCK = 1, WROTE_BEHIND = 2, BAD_LAUNCH = 3 };

struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t entry;
    jmp_buf place;
    bool born = false;
    Status status = DONE;
    unsigned shuffles = 0, loads = 0;
};

// A load of weights by one lane: lanes of a warp with the same number load at once.
struct Load { uint64_t address; uint32_t size, block, warp, number; };
inline std::vector<Load> loads;
inline bool records = false;

inline std::vector<Fiber> fibers(1024);
inline std::vector<uint64_t> deposits;  // [2, threads]: what lanes exchange
inline std::vector<std::array<unsigned, 6>> fragments;  // [2, threads]: what lanes give to an mma
inline jmp_buf scheduler;
inline unsigned current;
inline void (*body)();

inline void yield(Status status) {
    Fiber& fiber = fibers[current];
    fiber.status = status;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler, 1);
}

inline void live() {  // a fiber runs block after block
    for (;;) {
        body();
        yield(DONE);
    }
}

inline void resume(unsigned index) {
    Fiber& fiber = fibers[index];
    current = index;
    threadIdx.x = index;
    if (_setjmp(scheduler)) return;
    if (fiber.born) _longjmp(fiber.place, 1);
    fiber.born = true;
    fiber.stack = std::make_unique<char[]>(STACK);
    getcontext(&fiber.entry);
    fiber.entry.uc_stack.ss_sp = fiber.stack.get();
    fiber.entry.uc_stack.ss_size = STACK;
    makecontext(&fiber.entry, live, 0);
    setcontext(&fiber.entry);
}

inline bool release(unsigned first, unsigned count, Status status) {
    for (unsigned i = first; i < first + count; ++i)
        if (fibers[i].status != status) return false;
    for (unsigned i = first; i < first + count; ++i) fibers[i].status = RUNS;
    return true;
}

// Runs a block: rounds over the threads that can run, until all are done.
inline Fault run_block(std::vector<unsigned>& order, std::mt19937* random) {
    const unsigned threads = blockDim.x;
    for (unsigned i = 0; i < threads; ++i) fibers[i].status = RUNS, fibers[i].loads = 0;
    for (;;) {
        if (random) std::shuffle(order.begin(), order.end(), *random);
        const unsigned awake = random ? (*random)() : ~0u;  // a bit for each warp: the others stay where they are
        for (unsigned index : order)
            if (fibers[index].status == RUNS && awake >> index / LANES & 1) resume(index);
        bool moves = release(0, threads, WAITS_BLOCK), done = true;
        for (unsigned warp = 0; warp < threads; warp += LANES) moves |= release(warp, LANES, WAITS_WARP);
        for (unsigned i = 0; i < threads; ++i) {
            done &= fibers[i].status == DONE;
            moves |= fibers[i].status == RUNS;
        }
        if (done) return FINE;
        if (!moves) return DEADLOCK;
    }
}

inline Fault run_grid(std::size_t shared, int ordering) {
    if (shared > SHIM_SHARED || blockDim.x % LANES || blockDim.x > fibers.size()) return BAD_LAUNCH;
    std::mt19937 random(ordering);
    std::vector<unsigned> order(blockDim.x), blocks(gridDim.x * gridDim.y * gridDim.z);
    std::iota(order.begin(), order.end(), 0u);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (ordering == 1) std::reverse(order.begin(), order.end()), std::reverse(blocks.begin(), blocks.end());
    if (ordering > 1) std::shuffle(blocks.begin(), blocks.end(), random);
    deposits.assign(2 * blockDim.x, ~0ull);
    fragments.assign(2 * blockDim.x, {~0u, ~0u, ~0u, ~0u, ~0u, ~0u});
    char* memory = reinterpret_cast<char*>(shared_memory);
    for (unsigned block : blocks) {
        blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
        std::memset(memory, 0xff, shared + SHIM_GUARD);
        if (Fault fault = run_block(order, ordering > 1 ? &random : nullptr)) {
            for (Fiber& fiber : fibers) fiber.born = false;  // they are in the middle of a block that is given up
            return fault;
        }
        for (std::size_t i = shared; i < shared + SHIM_GUARD; ++i)
            if (memory[i] != '\xff') return WROTE_BEHIND;
    }
    return FINE;
}

template <class T> T exchange(T value, unsigned partner) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    // Two halves in turn: a lane can be at most one shuffle ahead of the others.
    uint64_t* half = deposits.data() + (fibers[current].shuffles++ & 1) * blockDim.x;
    std::memcpy(half + current, &value, sizeof value);
    yield(WAITS_WARP);
    const unsigned from = current / LANES * LANES + partner;
    T received;
    std::memcpy(&received, half + from, sizeof received);
    return received;
}

// One half of a word of lane `lane` of the own warp.
inline float part(const std::array<unsigned, 6>* warp, int lane, int word, int index) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(warp[lane][word] >> 16 * index)));
}

// Calls a kernel with its one argument, for each block and thread.
template <class Arguments> Fault launch(void (*kernel)(Arguments), const Arguments* given, const unsigned* grid,
                                        unsigned threads, std::size_t shared, int ordering) {
    static void (*chosen)(Arguments);
    static const Arguments* arguments;
    chosen = kernel;
    arguments = given;
    gridDim = {grid[0], grid[1], grid[2]};
    blockDim = {threads, 1, 1};
    body = [] { chosen(*arguments); };
    return run_grid(shared, ordering);
}

}  // namespace shim

template <class T> T __ldcs(const T* place) {
    if (shim::records) {
        const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
        shim::loads.push_back({reinterpret_cast<uint64_t>(place), sizeof(T), block, shim::current / shim::LANES,
                               shim::fibers[shim::current].loads++});
    }
    return *place;
}

// Records the loads of the next launch, and returns those of the launches since the last call.
extern "C" std::size_t shim_record(bool records, const shim::Load** loads) {
    static std::vector<shim::Load> last;
    last.swap(shim::loads);
    shim::loads.clear();
    shim::records = records;
    *loads = last.data();
    return last.size();
}

inline void __syncthreads() { shim::yield(shim::WAITS_BLOCK); }
inline void __syncwarp(unsigned = ~0u) { shim::yield(shim::WAITS_WARP); }
inline void __threadfence() {}
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::exchange(value, (threadIdx.x % shim::LANES) ^ static_cast<unsigned>(mask));
}
// mma.m16n8k16: c [16, 8] += a [16, 16] b [16, 8]; PTX ISA, "Matrix Fragments for mma.m16n8k16".
inline void mma(float* c, const unsigned* a, const unsigned* b) {
    auto* half = shim::fragments.data() + (shim::fibers[shim::current].shuffles++ & 1) * blockDim.x;
    half[shim::current] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    shim::yield(shim::WAITS_WARP);
    const auto* warp = half + shim::current / shim::LANES * shim::LANES;
    const int lane = shim::current % shim::LANES;
    for (int i = 0; i < 4; ++i) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) {
            const float x = shim::part(warp, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
            c[i] += x * shim::part(warp, column * 4 + k % 8 / 2, 4 + k / 8, k % 2);
        }
    }
}
inline unsigned atomicAdd(unsigned* place, unsigned value) {
    const unsigned before = *place;
    *place = before + value;
    return before;
}
inline unsigned atomicInc(unsigned* place, unsigned largest) {
    const unsigned before = *place;
    *place = before >= largest ? 0 : before + 1;
    return before;
}
