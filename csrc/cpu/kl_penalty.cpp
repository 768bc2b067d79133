// Per-token KL estimates, and the rewards made of them: -kl_coef * KL on every True position, plus the score on the
// last True position of a row.
#include "../math.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

constexpr int64_t kChunk = 4096;

template <typename T, int kEstimator>
void estimate(const T* logp, const T* ref, int64_t n, T* out, T* grad) {
    if (grad) {
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) out[k] = kl_term(logp[k] - ref[k], kEstimator, grad[k]);
        return;
    }
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) {
        T unused;
        out[k] = kl_term(logp[k] - ref[k], kEstimator, unused);
    }
}

template <typename T>
void estimate(const T* logp, const T* ref, int64_t n, int estimator, T* out, T* grad) {
    switch (estimator) {
        case kK1:
            return estimate<T, kK1>(logp, ref, n, out, grad);
        case kK2:
            return estimate<T, kK2>(logp, ref, n, out, grad);
        case kK3:
            return estimate<T, kK3>(logp, ref, n, out, grad);
        default:
            return estimate<T, kAbs>(logp, ref, n, out, grad);
    }
}

template <typename T>
void penalty(Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad, int threads) {
    const int team = team_size(n, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t i = 0; i < n; i += kChunk)
        estimate(logp.as<T>() + i, ref.as<T>() + i, minimum(kChunk, n - i), estimator, out.as<T>() + i,
                 grad ? grad.as<T>() + i : nullptr);
}

template <typename T>
void shape(Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t L, T kl_coef, int estimator,
           T clip, Pointer out, int threads) {
    const int team = team_size(B * L, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        const uint8_t* on = mask.as<uint8_t>() + b * L;
        T* reward = out.as<T>() + b * L;
        estimate<T>(logp.as<T>() + b * L, ref.as<T>() + b * L, L, estimator, reward, nullptr);
        int64_t last = -1;
        for (int64_t t = 0; t < L; ++t) {
            reward[t] = on[t] ? -kl_coef * reward[t] : T(0);
            if (on[t]) last = t;
        }
        if (last >= 0) reward[last] += clamp(scores.as<T>()[b], -clip, clip);
    }
}

}  // namespace

void kl_penalty(int dtype, Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad,
                int threads) {
    RLHF_BY_DTYPE(penalty, logp, ref, n, estimator, out, grad, threads);
}

void shape_rewards(int dtype, Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t T,
                   double kl_coef, int estimator, double clip, Pointer out, int threads) {
    RLHF_BY_DTYPE(shape, scores, logp, ref, mask, B, T, kl_coef, estimator, clip, out, threads);
}

}  // namespace rlhf::ISA
