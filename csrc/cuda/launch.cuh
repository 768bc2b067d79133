// What every CUDA kernel here shares: the maths in its own namespace, a fixed-order block reduction, launch errors as
// exceptions.
#pragma once
#define ISA cuda
#include <stdexcept>
#include <string>

#include "../math.h"
#include "ops.h"

namespace rlhf::cuda {
namespace {

constexpr int kThreads = 256;

// Combines one value per thread by a tree of fixed shape; the result is valid in thread 0.
template <typename State, typename Combine>
__device__ State block_reduce(State mine, Combine combine) {
    __shared__ alignas(State) char memory[kThreads * sizeof(State)];
    State* states = reinterpret_cast<State*>(memory);
    __syncthreads();  // an earlier call's result may still be being read
    states[threadIdx.x] = mine;
    for (int width = kThreads / 2; width > 0; width /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < width) combine(states[threadIdx.x], states[threadIdx.x + width]);
    }
    __syncthreads();
    return states[0];
}

inline void check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

inline cudaStream_t as_stream(Pointer stream) { return stream.as<CUstream_st>(); }

}  // namespace
}  // namespace rlhf::cuda
