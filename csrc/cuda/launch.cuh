// The base of all CUDA kernels: the maths in the namespace rlhf::cuda, launches whose errors are exceptions, and sums
// over a warp, a block and a grid. The order of a sum depends on the sizes alone.
#pragma once
#define ISA cuda
#include <stdexcept>
#include <string>

#include "../math.h"
#include "../pair_terms.h"
#include "../returns.h"
#include "../softmax_pair.h"
#include "ops.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;
constexpr unsigned kAll = 0xffffffffu;

// Memory that the blocks of a launch share. Each stream has its own, because the launches of a stream take turns.
struct Scratch {
    unsigned arrived[kMaxBlocks];  // 0 between launches
    double carried[4];             // results that a first launch leaves for the second
    char partials[kMaxBlocks * 64];
};
static_assert(sizeof(Scratch) == kScratchBytes);

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <typename... Parameters, typename... Arguments>
void launch(const char* what, Pointer stream, void (*kernel)(Parameters...), int64_t blocks, int threads,
            Arguments... arguments) {
    if (blocks == 0) return;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(unsigned(blocks));
    config.blockDim = dim3(unsigned(threads));
    config.stream = stream.as<CUstream_st>();
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), what);
}

inline int64_t blocks_for(int64_t elements, int64_t per_block) { return (elements + per_block - 1) / per_block; }

// The number of blocks of a kernel that loops over its tasks and sums over the grid. Without tasks there is one block,
// which writes the result of an empty sum.
inline int64_t bounded_blocks(int64_t tasks) { return clamp(tasks, int64_t(1), int64_t(kMaxBlocks)); }

struct Add {
    template <typename State>
    __device__ void operator()(State& a, const State& b) const {
        a += b;
    }
};

// A value of any size from another lane. The intrinsic shuffles the value word by word.
template <typename State, typename Intrinsic>
__device__ State shuffle(State mine, Intrinsic intrinsic) {
    constexpr int kWords = int(sizeof(State) / sizeof(unsigned));
    static_assert(sizeof(State) == kWords * sizeof(unsigned));
    unsigned words[kWords];
    memcpy(words, &mine, sizeof mine);
#pragma unroll
    for (int k = 0; k < kWords; ++k) words[k] = intrinsic(words[k]);
    memcpy(&mine, words, sizeof mine);
    return mine;
}

// The warp's sum, with the same bits in every lane, because each step adds the same two numbers in both lanes.
__device__ inline double warp_sum(double x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAll, x, step);
    return x;
}

// Combines one value per thread by a tree of fixed shape. Every thread gets the result.
template <typename State, typename Combine>
__device__ State block_reduce(State mine, Combine combine) {
    alignas(16) __shared__ char memory[32 * sizeof(State)];
    State* warps = reinterpret_cast<State*>(memory);
#pragma unroll
    for (int step = 16; step > 0; step /= 2)
        combine(mine, shuffle(mine, [=](unsigned word) { return __shfl_down_sync(kAll, word, step); }));
    __syncthreads();  // another thread may still read the result of an earlier call
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
    __syncthreads();
    State all = warps[0];
    for (int warp = 1; warp < int(blockDim.x / 32); ++warp) combine(all, warps[warp]);
    return all;
}

// Whether this block is the last of `expected` blocks to arrive. The last block sees all that thread 0 of every other
// block wrote before.
__device__ inline bool last_to_arrive(unsigned* arrived, unsigned expected) {
    __shared__ bool last;
    if (threadIdx.x == 0) {
        __threadfence();
        last = atomicAdd(arrived, 1u) == expected - 1;
        if (last) *arrived = 0;  // for the next launch
        __threadfence();
    }
    __syncthreads();
    return last;
}

// Combines one value per thread of the whole grid in a fixed order. The grid has at most kMaxBlocks blocks. Returns
// true in the threads of the block that has the result. A default State must be the empty sum.
template <typename State, typename Combine>
__device__ bool grid_reduce(State& sums, Combine combine, Scratch* scratch) {
    static_assert(sizeof(State) * kMaxBlocks <= sizeof(Scratch::partials));
    sums = block_reduce(sums, combine);
    if (gridDim.x == 1) return true;
    State* partials = reinterpret_cast<State*>(scratch->partials);
    if (threadIdx.x == 0) partials[blockIdx.x] = sums;
    if (!last_to_arrive(&scratch->arrived[0], gridDim.x)) return false;
    State all = State();
    for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) combine(all, partials[block]);
    sums = block_reduce(all, combine);
    return true;
}

}  // namespace
}  // namespace rlhf::cuda
