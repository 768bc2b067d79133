// Per-token KL estimates, and the rewards made of them: -kl_coef * KL on every True position, plus the score on the
// last True position of a row.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kPerThread = 4;  // tokens that a thread loads before it uses them

template <typename T>
__global__ void __launch_bounds__(kThreads)
    penalty(const T* logp, const T* ref, int64_t n, int estimator, T* out, T* grad) {
    const int64_t first = blockIdx.x * int64_t(kThreads * kPerThread) + threadIdx.x;
    T d[kPerThread];
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t i = first + k * kThreads;
        d[k] = i < n ? logp[i] - ref[i] : T(0);
    }
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t i = first + k * kThreads;
        T slope;
        const T value = kl_term(d[k], estimator, slope);
        if (i < n) out[i] = value;
        if (i < n && grad) grad[i] = slope;
    }
}

struct Latest {
    __device__ void operator()(int64_t& a, int64_t b) const { a = maximum(a, b); }
};

template <typename T>
__global__ void __launch_bounds__(kThreads)
    shape_rows(const T* scores, const T* logp, const T* ref, const uint8_t* mask, int64_t L, T kl_coef, int estimator,
               T clip, T* out) {
    const int64_t begin = blockIdx.x * L;
    int64_t last = -1;
    for (int64_t t = threadIdx.x; t < L; t += blockDim.x)
        if (mask[begin + t]) last = t;
    last = block_reduce(last, Latest());
    for (int64_t t = threadIdx.x; t < L; t += blockDim.x) {
        T reward = 0, slope;
        if (mask[begin + t]) reward = -kl_coef * kl_term(logp[begin + t] - ref[begin + t], estimator, slope);
        if (t == last) reward += clamp(scores[blockIdx.x], -clip, clip);
        out[begin + t] = reward;
    }
}

template <typename T>
void launch_penalty(Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad, Pointer stream) {
    launch("kl_penalty", stream, penalty<T>, blocks_for(n, kThreads * kPerThread), kThreads, logp.as<const T>(),
           ref.as<const T>(), n, estimator, out.as<T>(), grad.as<T>());
}

template <typename T>
void launch_shape(Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t L, double kl_coef,
                  int estimator, double clip, Pointer out, Pointer stream) {
    const int threads = int(32 * clamp(blocks_for(L, 32), int64_t(1), int64_t(kThreads / 32)));
    launch("shape_rewards", stream, shape_rows<T>, B, threads, scores.as<const T>(), logp.as<const T>(),
           ref.as<const T>(), mask.as<const uint8_t>(), L, T(kl_coef), estimator, T(clip), out.as<T>());
}

}  // namespace

void kl_penalty(int dtype, Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad,
                Pointer stream) {
    RLHF_BY_DTYPE(launch_penalty, logp, ref, n, estimator, out, grad, stream);
}

void shape_rewards(int dtype, Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t T,
                   double kl_coef, int estimator, double clip, Pointer out, Pointer stream) {
    RLHF_BY_DTYPE(launch_shape, scores, logp, ref, mask, B, T, kl_coef, estimator, clip, out, stream);
}

}  // namespace rlhf::cuda
