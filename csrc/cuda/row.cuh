// Rows of logits as threads read and write them: 16 bytes at a time between the first and the last aligned address,
// single elements before and after. Most rows of an odd V start at an unaligned address.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kMasked = -100;  // the token id of a row that does not count

// The type in which the arithmetic runs.
template <typename In>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename In>
using Compute = typename ComputeOf<In>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float& out) { out = x; }
__device__ inline void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ inline void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ inline void narrow(double x, double& out) { out = x; }

template <typename In>
constexpr int kWidth = int(16 / sizeof(In));

template <typename In>
__device__ void load_16_bytes(const In* from, Compute<In>* to) {
    const uint4 bytes = *reinterpret_cast<const uint4*>(from);
    In values[kWidth<In>];
    memcpy(values, &bytes, sizeof bytes);
#pragma unroll
    for (int k = 0; k < kWidth<In>; ++k) to[k] = widen(values[k]);
}
template <typename In>
__device__ void store_16_bytes(const Compute<In>* from, In* to) {
    In values[kWidth<In>];
#pragma unroll
    for (int k = 0; k < kWidth<In>; ++k) narrow(from[k], values[k]);
    uint4 bytes;
    memcpy(&bytes, values, sizeof bytes);
    *reinterpret_cast<uint4*>(to) = bytes;
}

template <typename T>
__device__ T capped(T z, T softcap) {
    return softcap == 0 ? z : softcap * tanh_of(z / softcap);
}

// Loads kWidth logits from a column on, -inf beyond the row's end. The load is one of 16 bytes where the address is
// aligned.
template <typename In>
__device__ void load_columns(const In* row, int64_t column, int64_t V, Compute<In> softcap, Compute<In>* z) {
    using T = Compute<In>;
    if (column + kWidth<In> <= V && uintptr_t(row + column) % 16 == 0) {
        load_16_bytes(row + column, z);
#pragma unroll
        for (int k = 0; k < kWidth<In>; ++k) z[k] = capped(z[k], softcap);
    } else {
#pragma unroll
        for (int k = 0; k < kWidth<In>; ++k)
            z[k] = column + k < V ? capped(T(widen(row[column + k])), softcap) : T(-kInf);
    }
}

// n logits as a head of single logits, lines of 16 bytes and a tail of single logits.
template <typename In>
struct Lines {
    int64_t head, lines, tail;  // logits of the head; number of lines; first column of the tail

    RLHF_INLINE Lines(const In* row, int64_t n)
        : head(minimum(int64_t(-uintptr_t(row) % 16 / sizeof(In)), n)),
          lines((n - head) / kWidth<In>),
          tail(head + lines * kWidth<In>) {}
};

// Calls `launch` with a value of the type that the dtype code names.
template <typename Launch>
void with_logits(int dtype, Launch launch) {
    switch (dtype) {
        case 0:
            return launch(float());
        case 1:
            return launch(__nv_bfloat16());
        case 2:
            return launch(__half());
        case 3:
            return launch(double());
    }
}

}  // namespace
}  // namespace rlhf::cuda
