// The online-softmax state of a row, merged from the states of a block's threads.
#pragma once
#include "row.cuh"

namespace rlhf::cuda {
namespace {

// Sums of 2^(d factor) and d 2^(d factor), with d = z - top.
template <typename T>
struct OnlineSums {
    T top = T(-kInf), sum = 0, centred = 0;

    RLHF_INLINE void move(T to, T factor) {
        if (sum != 0) {  // the top of an empty sum may be -inf
            const T d = maximum(top - to, kLowest<T> / factor), e = exp2_scaled(d, factor);
            centred = e * (centred + sum * d);
            sum *= e;
        }
        top = to;
    }
    template <int kCount>
    RLHF_INLINE void add(const T (&z)[kCount], T factor) {
        T highest = top;
#pragma unroll
        for (int k = 0; k < kCount; ++k) highest = z[k] > highest ? z[k] : highest;
        if (highest > top) move(highest, factor);
        const T shift = top > T(-kInf) ? top : T(0), lowest = kLowest<T> / factor;
        T new_sum = 0, new_centred = 0;  // short separate sums keep more digits
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            const T d = z[k] - shift, clamped = d < lowest ? lowest : d, e = exp2_scaled(clamped, factor);
            new_sum += e;
            new_centred += e * clamped;
        }
        sum += new_sum;
        centred += new_centred;
    }
};

struct Largest {
    template <typename T>
    __device__ void operator()(T& a, T b) const {
        a = maximum(a, b);
    }
};
struct Sums {
    double sum, centred;
    __device__ void operator+=(const Sums& other) {
        sum += other.sum;
        centred += other.centred;
    }
};

// Merges the threads' states into the state of all the block's logits. All states move to the same top first, so that
// the rest is sums.
template <typename T>
__device__ Softmax merge_threads(OnlineSums<T> mine, T factor, double inv_temperature) {
    const T top = block_reduce(mine.top, Largest());
    mine.move(top, factor);
    const Sums all = block_reduce(Sums{double(mine.sum), double(mine.centred)}, Add());
    return {double(top), all.sum, all.centred * inv_temperature};
}

// Merges one Softmax per thread into the block's.
__device__ inline Softmax merge_states(Softmax mine, double inv_temperature) {
    const double top = block_reduce(mine.shift, Largest());
    mine.move(top, inv_temperature);
    const Sums all = block_reduce(Sums{mine.sum, mine.centred}, Add());
    return {top, all.sum, all.centred};
}

}  // namespace
}  // namespace rlhf::cuda
