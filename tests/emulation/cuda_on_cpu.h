// CUDA C++ on a CPU, for tests: `g++ -x c++ -include tests/emulation/cuda_on_cpu.h csrc/sampling.cu` compiles a kernel as it is.
//
// Blocks run one after the other, the threads of a block as fibers that take turns: each runs until it meets a barrier
// or a warp collective, and goes on once all that must meet it have. Whose turn it is, is shuffled anew every time
// (CUDA_ON_CPU_SEED), so a result that lacks a barrier differs from seed to seed.

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, threads, stream, ...) cuda_on_cpu::launch(grid, threads, [=] { kernel(__VA_ARGS__); })

using std::isfinite;
using std::isnan;
using std::max;
using std::min;

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;
inline int cudaGetLastError() { return 0; }
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_cpu {

enum State { READY, AT_BARRIER, AT_COLLECTIVE, DONE };

struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state = READY;
    uint64_t offered = 0;
    static constexpr size_t STACK = 64 << 10;
};

inline std::vector<Fiber> fibers;
inline ucontext_t scheduler;
inline unsigned current;
inline std::function<void()> kernel;

inline void wait_as(State state) {
    fibers[current].state = state;
    swapcontext(&fibers[current].context, &scheduler);
}

inline void run_fiber() {
    kernel();
    wait_as(DONE);
}

// Whether everyone in [first, last) who is not done waits in `state`; then they may go on.
inline bool release(size_t first, size_t last, State state) {
    bool any = false;
    for (size_t i = first; i < last; ++i) {
        if (fibers[i].state == READY) return false;
        if (fibers[i].state != state && fibers[i].state != DONE) return false;
        any |= fibers[i].state == state;
    }
    for (size_t i = first; any && i < last; ++i)
        if (fibers[i].state == state) fibers[i].state = READY;
    return any;
}

inline void run_block(unsigned threads, std::mt19937& random) {
    std::vector<unsigned> order(threads);
    for (unsigned i = 0; i < threads; ++i) {
        order[i] = i;
        Fiber& fiber = fibers[i];
        fiber.state = READY;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Fiber::STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool progress = true; progress;) {
        progress = false;
        std::shuffle(order.begin(), order.end(), random);
        for (unsigned i : order) {
            if (fibers[i].state != READY) continue;
            current = i;
            threadIdx = dim3(i);
            swapcontext(&scheduler, &fibers[i].context);
            progress = true;
        }
        for (unsigned warp = 0; warp < threads; warp += 32) progress |= release(warp, min(warp + 32, threads), AT_COLLECTIVE);
        progress |= release(0, threads, AT_BARRIER);
    }
    for (unsigned i = 0; i < threads; ++i)
        if (fibers[i].state != DONE) {
            std::fprintf(stderr, "thread %u of block (%u, %u) waits for others that never come\n", i, blockIdx.x, blockIdx.y);
            std::abort();
        }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> work) {
    const char* seed = std::getenv("CUDA_ON_CPU_SEED");
    std::mt19937 random(seed ? std::atoi(seed) : 0);
    kernel = std::move(work);
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            run_block(threads, random);
        }
}

// Every lane offers a value, all meet, each reads another's. A second meeting keeps the fast from offering anew before
// the slow have read.
template <class T>
T from_lane(T value, unsigned lane) {
    std::memcpy(&fibers[current].offered, &value, sizeof value);
    wait_as(AT_COLLECTIVE);
    T result;
    std::memcpy(&result, &fibers[current / 32 * 32 + lane].offered, sizeof result);
    wait_as(AT_COLLECTIVE);
    return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::wait_as(cuda_on_cpu::AT_BARRIER); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int distance) {
    return cuda_on_cpu::from_lane(value, threadIdx.x % 32 ^ distance);
}

template <class T>
T __shfl_up_sync(uint32_t, T value, int distance) {
    const int lane = threadIdx.x % 32;
    return cuda_on_cpu::from_lane(value, lane >= distance ? lane - distance : lane);
}

template <class T>
T atomicAdd(T* where, T value) {
    T before = *where;
    *where += value;
    return before;
}

inline uint32_t __float_as_uint(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float __uint_as_float(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
