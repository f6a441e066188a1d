// The part of CUDA C++ that csrc/sampling.cu uses, on a CPU, for tests. This command compiles the kernel unchanged:
// `g++ -x c++ -include tests/emulation/cuda_on_cpu.h csrc/sampling.cu`.
//
// Blocks run one after the other. The threads of a block are fibers that take turns: each fiber runs until it reaches a
// barrier or a warp collective, and continues when all threads that take part have reached it. A warp runs until all of
// its threads wait at a barrier before the next warp starts, so it is as far ahead of the others as barriers allow. The
// order of warps and of threads is shuffled with the seed CUDA_ON_CPU_SEED. If a barrier is missing, the result depends
// on the seed.

#undef _FORTIFY_SOURCE  // its longjmp allows no jump to another stack
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
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
    ucontext_t context;  // starts the fiber
    jmp_buf resume;      // where it waits: unlike swapcontext, a jump needs no system call
    bool started = false;
    std::unique_ptr<char[]> stack{new char[STACK]};
    State state = READY;
    uint64_t exchanged = 0;
    static constexpr size_t STACK = 64 << 10;
};

inline std::vector<Fiber> fibers;
inline jmp_buf scheduler;
inline unsigned current_fiber;
inline std::function<void()> current_kernel;

inline void switch_to_scheduler(State state) {
    fibers[current_fiber].state = state;
    if (!_setjmp(fibers[current_fiber].resume)) _longjmp(scheduler, 1);
}

inline void run_fiber() {
    current_kernel();
    switch_to_scheduler(DONE);
}

inline void switch_to_fiber(Fiber& fiber) {
    if (_setjmp(scheduler)) return;
    if (fiber.started) _longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.context);
}

// If every fiber in [first, last) that is not done waits in `state`, makes these fibers ready and returns true.
inline bool release_waiting(size_t first, size_t last, State state) {
    bool any_waiting = false;
    for (size_t i = first; i < last; ++i) {
        if (fibers[i].state == READY) return false;
        if (fibers[i].state != state && fibers[i].state != DONE) return false;
        any_waiting |= fibers[i].state == state;
    }
    for (size_t i = first; any_waiting && i < last; ++i)
        if (fibers[i].state == state) fibers[i].state = READY;
    return any_waiting;
}

inline void run_block(unsigned threads, std::mt19937& random) {
    std::vector<unsigned> warps(threads / 32), lanes(32);
    std::iota(warps.begin(), warps.end(), 0);
    std::iota(lanes.begin(), lanes.end(), 0);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = fibers[i];
        fiber.state = READY;
        fiber.started = false;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = Fiber::STACK;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, run_fiber, 0);
    }
    for (bool progress = true; progress;) {
        std::shuffle(warps.begin(), warps.end(), random);
        for (unsigned warp : warps) do {
            std::shuffle(lanes.begin(), lanes.end(), random);
            for (unsigned lane : lanes) {
                current_fiber = warp * 32 + lane;
                if (fibers[current_fiber].state != READY) continue;
                threadIdx = dim3(current_fiber);
                switch_to_fiber(fibers[current_fiber]);
            }
        } while (release_waiting(warp * 32, warp * 32 + 32, AT_COLLECTIVE));
        progress = release_waiting(0, threads, AT_BARRIER);
    }
    for (unsigned i = 0; i < threads; ++i)
        if (fibers[i].state != DONE) {
            std::fprintf(stderr, "thread %u of block (%u, %u) waits for threads that never arrive\n", i, blockIdx.x, blockIdx.y);
            std::abort();
        }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> kernel_call) {
    const char* seed = std::getenv("CUDA_ON_CPU_SEED");
    std::mt19937 random(seed ? std::atoi(seed) : 0);
    current_kernel = std::move(kernel_call);
    if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
    gridDim = grid;
    blockDim = dim3(threads);
    for (unsigned y = 0; y < grid.y; ++y)
        for (unsigned x = 0; x < grid.x; ++x) {
            blockIdx = dim3(x, y);
            run_block(threads, random);
        }
}

// Every lane writes its value, all lanes wait, and each lane reads the value of another lane. The second wait keeps a fast
// lane from overwriting its value before a slow lane has read it.
template <class T>
T shuffle_from_lane(T value, unsigned lane) {
    std::memcpy(&fibers[current_fiber].exchanged, &value, sizeof value);
    switch_to_scheduler(AT_COLLECTIVE);
    T result;
    std::memcpy(&result, &fibers[current_fiber / 32 * 32 + lane].exchanged, sizeof result);
    switch_to_scheduler(AT_COLLECTIVE);
    return result;
}

}  // namespace cuda_on_cpu

inline void __syncthreads() { cuda_on_cpu::switch_to_scheduler(cuda_on_cpu::AT_BARRIER); }

template <class T>
T __shfl_xor_sync(uint32_t, T value, int distance) {
    return cuda_on_cpu::shuffle_from_lane(value, threadIdx.x % 32 ^ distance);
}

template <class T>
T __shfl_up_sync(uint32_t, T value, int distance) {
    const int lane = threadIdx.x % 32;
    return cuda_on_cpu::shuffle_from_lane(value, lane >= distance ? lane - distance : lane);
}

template <class T>
T atomicAdd(T* address, T value) {
    T previous = *address;
    *address += value;
    return previous;
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
