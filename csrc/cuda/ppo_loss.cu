// Clipped policy loss: value, gradient and statistics. Three launches: True tokens per row, one block per row, the rows
// combined in a fixed order. Per-row sums in double, no atomics, no wait for the device.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

struct Add {
    __device__ void operator()(double& a, double b) const { a += b; }
    __device__ void operator()(PPOSums& a, const PPOSums& b) const { a.add(b, 1); }
};

__global__ void count_rows(const uint8_t* mask, int64_t L, PPOSums* rows) {
    double count = 0;
    for (int64_t t = threadIdx.x; t < L; t += kThreads) count += mask[blockIdx.x * L + t] ? 1 : 0;
    count = block_reduce(count, Add());
    if (threadIdx.x == 0) rows[blockIdx.x].count = count;
}

__device__ double total_count(const PPOSums* rows, int64_t B) {
    double count = 0;
    for (int64_t b = threadIdx.x; b < B; b += kThreads) count += rows[b].count;
    return block_reduce(count, Add());
}

struct Options {
    double clip_low, clip_high, dual_clip, kl_coef, entropy_coef, denominator;
    int estimator, reduction;
    bool per_token;
};

template <typename T>
__global__ void row_sums(const T* logp, const T* old_logp, const T* advantages, const uint8_t* mask, const T* ref,
                         const T* entropy, int64_t B, int64_t L, Options options, T* grad_logp, T* grad_entropy,
                         PPOSums* rows, double* weights) {
    const int64_t b = blockIdx.x;
    const double count = rows[b].count, total = total_count(rows, B);
    const double weight = token_weight(count, total, double(B), options.reduction, options.denominator);
    const T dual = options.dual_clip > 0 ? T(options.dual_clip) : T(kInf), limit = T(kMaxLogRatio);
    PPOSums sums;
    for (int64_t t = threadIdx.x; t < L; t += kThreads) {
        const int64_t i = b * L + t;
        T gradient = 0;
        if (mask[i]) {
            const T advantage = advantages[options.per_token ? i : b];
            T by_logp, approx_kl, clipped;
            const T log_ratio = logp[i] - old_logp[i], ratio = ratio_of(log_ratio, approx_kl);
            sums.policy += ppo_term(log_ratio, ratio, advantage, T(options.clip_low), T(options.clip_high), dual,
                                    by_logp, clipped);
            gradient = T(weight) * by_logp;
            sums.clipped += clipped;
            sums.approx_kl += approx_kl;
            sums.ratio += ratio;
            sums.ratio_max = maximum(double(ratio), sums.ratio_max);
            if (ref) {
                const T d = logp[i] - ref[i], x = clamp(d, -limit, limit);
                sums.kl += kl_term(x, options.estimator, by_logp);
                gradient += x == d ? T(weight * options.kl_coef) * by_logp : T(0);
            }
            if (entropy) sums.entropy += entropy[i];
        }
        if (grad_logp) grad_logp[i] = gradient;
        if (grad_entropy) grad_entropy[i] = mask[i] ? T(-options.entropy_coef * weight) : T(0);
    }
    sums = block_reduce(sums, Add());
    if (threadIdx.x != 0) return;
    weights[b] = weight;
    sums.count = 0;  // other blocks may still read the row's own count
    rows[B + b] = sums;
}

template <typename T>
__global__ void combine(const PPOSums* rows, const double* weights, int64_t B, Options options, T* stats) {
    PPOSums sums;
    for (int64_t b = threadIdx.x; b < B; b += kThreads) {
        sums.add(rows[B + b], weights[b]);
        sums.count += rows[b].count;
    }
    sums = block_reduce(sums, Add());
    if (threadIdx.x == 0) sums.write(stats, options.kl_coef, options.entropy_coef);
}

template <typename T>
void launch(Pointer logp, Pointer old_logp, Pointer advantages, Pointer mask, Pointer ref, Pointer entropy, int64_t B,
            int64_t L, Options options, Pointer grad_logp, Pointer grad_entropy, Pointer stats, Pointer stream_) {
    const cudaStream_t stream = as_stream(stream_);
    void* workspace = nullptr;
    check(cudaMallocAsync(&workspace, size_t(B) * (2 * sizeof(PPOSums) + sizeof(double)) + 1, stream),
          "ppo_loss workspace");
    PPOSums* rows = static_cast<PPOSums*>(workspace);
    double* weights = reinterpret_cast<double*>(rows + 2 * B);
    if (B > 0) {
        count_rows<<<unsigned(B), kThreads, 0, stream>>>(mask.as<const uint8_t>(), L, rows);
        row_sums<T><<<unsigned(B), kThreads, 0, stream>>>(logp.as<const T>(), old_logp.as<const T>(),
                                                          advantages.as<const T>(), mask.as<const uint8_t>(),
                                                          ref.as<const T>(), entropy.as<const T>(), B, L, options,
                                                          grad_logp.as<T>(), grad_entropy.as<T>(), rows, weights);
    }
    combine<T><<<1, kThreads, 0, stream>>>(rows, weights, B, options, stats.as<T>());
    check(cudaGetLastError(), "ppo_loss");
    check(cudaFreeAsync(workspace, stream), "ppo_loss workspace");
}

}  // namespace

void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, double clip_low, double clip_high, double dual_clip,
              double kl_coef, int estimator, double entropy_coef, int reduction, double denominator, Pointer grad_logp,
              Pointer grad_entropy, Pointer stats, Pointer stream) {
    const Options options = {clip_low,    clip_high, dual_clip, kl_coef,  entropy_coef,
                             denominator, estimator, reduction, per_token};
    RLHF_BY_DTYPE(launch, logp, old_logp, advantages, mask, ref, entropy, B, T, options, grad_logp, grad_entropy, stats,
                  stream);
}

}  // namespace rlhf::cuda
