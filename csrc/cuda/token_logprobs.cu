// log p(token) and entropy of softmax(logits / temperature): one block per row and one pass over it, no atomics. Left
// out: rows split over several blocks, and 16-byte loads (an odd V leaves every other row unaligned).
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int64_t kMasked = -100;
constexpr int kUnroll = 8;  // logits a thread has in flight

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

__device__ float widen(float x) { return x; }
__device__ float widen(__half x) { return __half2float(x); }
__device__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ double widen(double x) { return x; }
__device__ void narrow(float x, float& out) { out = x; }
__device__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ void narrow(double x, double& out) { out = x; }

template <typename In>
__device__ Compute<In> logit(const In* row, int64_t j, Compute<In> softcap) {
    const Compute<In> z = widen(row[j]);
    return softcap == 0 ? z : softcap * tanh_of(z / softcap);
}

// This thread's share of the row, columns threadIdx.x + k * kThreads, without the target.
template <typename In>
__device__ Softmax accumulate(const In* row, int64_t V, int64_t target, double inv_temperature, Compute<In> softcap) {
    using T = Compute<In>;
    const T factor = T(inv_temperature * kLog2E), lowest = kLowest<T> / factor;
    T m = T(-kInf), sum = 0, centred = 0;  // of 2^(d factor) and d 2^(d factor), d = z - m
    for (int64_t first = threadIdx.x; first < V; first += kUnroll * kThreads) {
        T z[kUnroll], top = m;
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            const int64_t j = first + k * kThreads;
            z[k] = j < V && j != target ? logit(row, j, softcap) : T(-kInf);
            top = z[k] > top ? z[k] : top;
        }
        const T shift = top > T(-kInf) ? top : T(0);
        if (sum != 0) {
            const T d = maximum(m - shift, lowest), e = exp2_scaled(d, factor);
            centred = e * (centred + sum * d);
            sum *= e;
        }
        m = top;
#pragma unroll
        for (int k = 0; k < kUnroll; ++k) {
            T d = z[k] - shift;
            d = d < lowest ? lowest : d;
            const T e = exp2_scaled(d, factor);
            sum += e;
            centred += e * d;
        }
    }
    Softmax state;
    state.shift = double(m);
    state.sum = double(sum);
    state.centred = double(centred) * inv_temperature;
    return state;
}

template <typename In>
__global__ void forward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t V, double inv_temperature,
                        double softcap, Compute<In>* logprobs, Compute<In>* entropy, Compute<In>* stats) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x, target = ids[i];
    const In* row = logits + i * row_stride;
    RowOutputs out = {0, 0, 0, 0};
    if (target != kMasked) {
        const Softmax others = block_reduce(accumulate(row, V, target, inv_temperature, T(softcap)),
                                            [=](Softmax& a, const Softmax& b) { a.merge(b, inv_temperature); });
        const bool in_range = target >= 0 && target < V;
        if (threadIdx.x == 0)
            out = row_outputs(others, in_range ? double(logit(row, target, T(softcap))) : kInf - kInf, inv_temperature);
    }
    if (threadIdx.x != 0) return;
    logprobs[i] = T(out.logprob);
    entropy[i] = T(out.entropy);
    stats[2 * i] = T(out.shift);
    stats[2 * i + 1] = T(out.log_sum);
}

// dz_j = gL (1[j = t] - p_j) - gH p_j (log p_j + H), by the chain rule through the temperature and the softcap.
// grad_logits may be the same memory as logits.
template <typename In>
__global__ void backward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t V, double inv_temperature,
                         double softcap, const Compute<In>* logprobs, const Compute<In>* entropy,
                         const Compute<In>* stats, const Compute<In>* grad_logprobs, const Compute<In>* grad_entropy,
                         In* grad_logits, int64_t grad_row_stride) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x, target = ids[i];
    const In* row = logits + i * row_stride;
    In* out = grad_logits + i * grad_row_stride;
    const T g_logprob = grad_logprobs ? grad_logprobs[i] : T(0), g_entropy = grad_entropy ? grad_entropy[i] : T(0);
    const T factor = T(inv_temperature * kLog2E), lowest = kLowest<T> / factor, shift = stats[2 * i], cap = T(softcap);
    const T log_sum = stats[2 * i + 1], scale = -T(inv_temperature) * exp_of(-log_sum);
    const T slope = scale * g_entropy * T(inv_temperature),
            offset = scale * (g_logprob + g_entropy * (entropy[i] - log_sum));
    for (int64_t j = threadIdx.x; j < V; j += kThreads) {
        if (target == kMasked) {
            narrow(T(0), out[j]);
            continue;
        }
        const T z = logit(row, j, cap);
        T d = z - shift;
        d = d < lowest ? lowest : d;
        T dz = exp2_scaled(d, factor) * (slope * d + offset);
        if (j == target)
            dz = T(target_gradient(double(logprobs[i]), double(entropy[i]), double(g_logprob), double(g_entropy)) *
                   inv_temperature);
        narrow(softcap == 0 ? dz : dz * (1 - (z / cap) * (z / cap)), out[j]);
    }
}

template <typename In>
void launch_forward(Pointer logits, int64_t row_stride, Pointer ids, int64_t N, int64_t V, double inv_temperature,
                    double softcap, Pointer logprobs, Pointer entropy, Pointer stats, Pointer stream) {
    using T = Compute<In>;
    forward<In><<<unsigned(N), kThreads, 0, as_stream(stream)>>>(logits.as<const In>(), row_stride,
                                                                 ids.as<const int64_t>(), V, inv_temperature, softcap,
                                                                 logprobs.as<T>(), entropy.as<T>(), stats.as<T>());
    check(cudaGetLastError(), "token_logprobs");
}

template <typename In>
void launch_backward(Pointer logits, int64_t row_stride, Pointer ids, int64_t N, int64_t V, double inv_temperature,
                     double softcap, Pointer logprobs, Pointer entropy, Pointer stats, Pointer grad_logprobs,
                     Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride, Pointer stream) {
    using T = Compute<In>;
    backward<In><<<unsigned(N), kThreads, 0, as_stream(stream)>>>(
        logits.as<const In>(), row_stride, ids.as<const int64_t>(), V, inv_temperature, softcap, logprobs.as<const T>(),
        entropy.as<const T>(), stats.as<const T>(), grad_logprobs.as<const T>(), grad_entropy.as<const T>(),
        grad_logits.as<In>(), grad_row_stride);
    check(cudaGetLastError(), "token_logprobs_backward");
}

}  // namespace

#define RLHF_BY_LOGITS(FUNCTION, ...)                    \
    switch (N == 0 ? -1 : dtype) {                       \
        case 0:                                          \
            return FUNCTION<float>(__VA_ARGS__);         \
        case 1:                                          \
            return FUNCTION<__nv_bfloat16>(__VA_ARGS__); \
        case 2:                                          \
            return FUNCTION<__half>(__VA_ARGS__);        \
        case 3:                                          \
            return FUNCTION<double>(__VA_ARGS__);        \
    }

void token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                    double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                    Pointer stream) {
    RLHF_BY_LOGITS(launch_forward, logits, row_stride, ids, N, V, inv_temperature, softcap, logprobs, entropy, stats,
                   stream)
}

void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride,
                             Pointer stream) {
    RLHF_BY_LOGITS(launch_backward, logits, row_stride, ids, N, V, inv_temperature, softcap, logprobs, entropy, stats,
                   grad_logprobs, grad_entropy, grad_logits, grad_row_stride, stream)
}

}  // namespace rlhf::cuda
