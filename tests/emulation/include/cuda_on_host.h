// The part of CUDA that csrc/cuda uses, on a CPU. A C++ compiler builds the kernels with this header included first,
// and the kernels run on host memory. Blocks run one after another. A block's threads are fibers that give way at
// barriers and shuffles; a barrier that not all threads reach aborts. The emulation does not show incoherent memory,
// races between threads that no barrier orders, or time.
#pragma once
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned x_ = 1) : x(x_) {}
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_on_host {

constexpr size_t kStack = (1 << 16) + 5 * 64;  // a power of 2 would map the tops of all stacks to few lines of cache
constexpr unsigned kMostThreads = 1024;

template <typename T>
struct Same {  // excludes a parameter from the deduction of template arguments
    using type = T;
};

struct Rendezvous {  // of a block's or a warp's threads
    long arrived = 0;
};

// The state of a stack while another stack runs. `change(from, to)` leaves the first for the second.
#if defined(__x86_64__)
struct Context {
    void** top;  // of the stack: the registers that a call keeps, under its return address

    void start(char* stack, size_t size, void (*body)()) {
        top = reinterpret_cast<void**>(stack + size) - 8;  // where `body` begins as if called: 8 bytes off a line of 16
        top[6] = reinterpret_cast<void*>(body);
    }
};
__attribute__((naked, noinline)) inline void change(Context&, const Context&) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov (%rsi), %rsp;"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");
}
#else  // each change makes system calls
struct Context {
    ucontext_t context;

    void start(char* stack, size_t size, void (*body)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        makecontext(&context, body, 0);
    }
};
inline void change(Context& from, const Context& to) { swapcontext(&from.context, &to.context); }
#endif

struct Fiber {
    Context here;
    bool started = false, done = false;
    long block_barriers = 0, warp_barriers = 0;
};

struct Warp {
    Rendezvous meeting;
    unsigned words[2][32];  // used by turns, because a lane may still read the words of the shuffle before
};

struct Machine {
    std::vector<char> stacks = std::vector<char>(kStack * kMostThreads);
    std::vector<Fiber> fibers = std::vector<Fiber>(kMostThreads);
    std::vector<Warp> warps = std::vector<Warp>(kMostThreads / 32);
    Rendezvous block;
    Context scheduler;
    unsigned current = 0;
    bool moved = false;  // since the scheduler last looked at every thread
    long blocks = 0;     // that have begun, of all launches
    void (*body)(void*) = nullptr;
    void* arguments = nullptr;
};

inline Machine machine;

inline void give_way() { change(machine.fibers[machine.current].here, machine.scheduler); }

inline void meet(Rendezvous& meeting, long& mine, unsigned threads) {
    const long all = ++mine * threads;
    ++meeting.arrived;
    machine.moved = true;
    while (meeting.arrived < all) give_way();
    machine.moved = true;
}

inline void run_thread() {
    for (;;) {  // a fiber outlives its block: it goes on as a thread of the next
        machine.body(machine.arguments);
        machine.fibers[machine.current].done = machine.moved = true;
        give_way();
    }
}

inline void resume(unsigned thread) {
    Fiber& fiber = machine.fibers[thread];
    machine.current = thread;
    threadIdx.x = thread;
    if (!fiber.started) fiber.here.start(machine.stacks.data() + thread * kStack, kStack, run_thread);
    fiber.started = true;
    change(machine.scheduler, fiber.here);
}

inline void run_block(unsigned threads) {
    ++machine.blocks;
    for (unsigned k = 0; k < threads; ++k) {
        machine.fibers[k].done = false;
        machine.fibers[k].block_barriers = machine.fibers[k].warp_barriers = 0;
    }
    for (Warp& warp : machine.warps) warp.meeting = Rendezvous();
    machine.block = Rendezvous();
    for (bool running = true; running;) {
        running = machine.moved = false;
        for (unsigned k = 0; k < threads; ++k) {
            if (!machine.fibers[k].done) resume(k);
            running |= !machine.fibers[k].done;
        }
        if (running && !machine.moved) {
            fprintf(stderr, "cuda_on_host: block %u waits at a barrier that not all its threads reach\n", blockIdx.x);
            abort();
        }
    }
}

inline unsigned shuffle(unsigned mask, unsigned word, int from) {
    const int lane = int(threadIdx.x % 32);
    if (mask != 0xffffffffu) abort();
    Fiber& fiber = machine.fibers[machine.current];
    Warp& warp = machine.warps[machine.current / 32];
    unsigned* words = warp.words[fiber.warp_barriers % 2];
    words[lane] = word;
    meet(warp.meeting, fiber.warp_barriers, 32);
    return words[from < 0 || from > 31 ? lane : from];
}
inline double shuffle(unsigned mask, double x, int from) {
    unsigned words[2];
    memcpy(words, &x, sizeof x);
    for (unsigned& word : words) word = shuffle(mask, word, from);
    memcpy(&x, words, sizeof x);
    return x;
}

}  // namespace cuda_on_host

inline void __syncthreads() {
    cuda_on_host::meet(cuda_on_host::machine.block,
                       cuda_on_host::machine.fibers[cuda_on_host::machine.current].block_barriers, blockDim.x);
}
inline void __threadfence() {}
template <typename T>
T __shfl_down_sync(unsigned mask, T x, int step) {
    return cuda_on_host::shuffle(mask, x, int(threadIdx.x % 32) + step);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T x, int step) {
    return cuda_on_host::shuffle(mask, x, int(threadIdx.x % 32) - step);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int step) {
    return cuda_on_host::shuffle(mask, x, int(threadIdx.x % 32) ^ step);
}
inline unsigned atomicAdd(unsigned* to, unsigned x) {
    const unsigned before = *to;
    *to += x;
    return before;
}
inline int __popcll(unsigned long long bits) { return __builtin_popcountll(bits); }

enum cudaError_t { cudaSuccess };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    cudaStream_t stream;
};
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
inline cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
    *value = 4;
    return cudaSuccess;
}

// Odd launches run their blocks from the last to the first, because no result may depend on the order.
template <typename... Parameters>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               typename cuda_on_host::Same<Parameters>::type... arguments) {
    static unsigned launches = 0;
    const bool backwards = launches++ % 2 == 1;
    auto call = [&] { kernel(arguments...); };
    cuda_on_host::machine.body = [](void* bound) { (*static_cast<decltype(call)*>(bound))(); };
    cuda_on_host::machine.arguments = &call;
    ::gridDim = config->gridDim;
    ::blockDim = config->blockDim;
    for (unsigned k = 0; k < config->gridDim.x; ++k) {
        ::blockIdx.x = backwards ? config->gridDim.x - 1 - k : k;
        cuda_on_host::run_block(config->blockDim.x);
    }
    return cudaSuccess;
}

// Half types, converted through the bits of a float.
struct __nv_bfloat16 {
    uint16_t bits;
};
struct __half {
    uint16_t bits;
};
inline float float_of(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __bfloat162float(__nv_bfloat16 x) { return float_of(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
    const uint32_t bits = bits_of(x);
    return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const bool finite = magnitude < 0x0f800000;
    return float_of(sign | (finite ? bits_of(float_of(magnitude) * 0x1p112f) : magnitude | 0x7f800000));
}
inline __half __float2half_rn(float x) {
    const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    uint32_t half;
    if (magnitude > 0x7f800000)
        half = 0x7fff;
    else if (magnitude >= 0x477ff000)  // rounds to infinity
        half = 0x7c00;
    else if (magnitude < 0x38800000)  // denormal: a half's unit is that of 0.5 in float
        half = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000;
    else
        half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
    return {uint16_t(sign | half)};
}
