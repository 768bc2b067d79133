// Clipped policy, clipped value and REINFORCE losses: value, gradient and statistics in one pass. A block is summed in
// float, blocks are added in double, rows in their order, so that the bits do not depend on the number of threads.
#include <vector>

#include "../math.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

constexpr int64_t kTokens = 256;  // tokens of a block

// The number of True bytes. 32 bytes side by side count to 255 each before they are added up.
int64_t count_true(const uint8_t* mask, int64_t n) {
    constexpr int kBytes = 32;
    int64_t count = 0, i = 0;
    while (i + kBytes <= n) {
        uint8_t counts[kBytes] = {};
        for (int j = 0; j < 255 && i + kBytes <= n; ++j, i += kBytes)
#pragma omp simd
            for (int k = 0; k < kBytes; ++k) counts[k] = uint8_t(counts[k] + (mask[i + k] != 0));
        for (int k = 0; k < kBytes; ++k) count += counts[k];
    }
    for (; i < n; ++i) count += mask[i] != 0;
    return count;
}

// The mask as 1 and 0 in T, because a loop over floats and bytes together would take four registers of each.
template <typename T>
void widen_mask(const uint8_t* mask, int64_t n, T* on) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) on[k] = mask[k] ? T(1) : T(0);
}

// What a term needs at compile time: PPO's term without and with the dual clip, and the terms of other objectives.
enum Term { kClipTerm, kDualTerm, kCispoTerm, kSapoTerm };

// The tokens of a block. The log-ratio of a token is current - old: of its own log-probs, or of its row's mean and 0.
template <typename T>
struct Tokens {
    const T *logp, *current, *old, *advantage, *on;
    int64_t n;
};

// Adds a block's terms to the sums. kNear: the ratios are computed without an exponential; if a log-ratio is 1/2 or
// more, the function adds nothing and returns false.
template <typename T, bool kNear, int kTerm>
bool policy_block(const Tokens<T>& x, const PolicyOptions<T>& options, T weight, T* grad, PPOSums& sums) {
    // Two loops, because the values of both together do not fit in the registers.
    T ratios[kTokens];
    T policy = 0, clipped = 0, approx_kl = 0, ratio = 0, ratio_max = T(-kInf), furthest = 0;
    const T *logp = x.logp, *current = x.current, *old = x.old, *advantage = x.advantage, *mask = x.on;
    const int64_t n = x.n;
#pragma omp simd reduction(+ : approx_kl, ratio) reduction(max : ratio_max, furthest)
    for (int64_t k = 0; k < n; ++k) {
        const bool on = mask[k] != 0;
        const T log_ratio = current[k] - old[k];
        T k3, r;
        if constexpr (kNear) {
            r = near_ratio_of(log_ratio, k3);
            const T far = log_ratio < 0 ? -log_ratio : log_ratio, seen = on ? far : T(0);
            furthest = seen > furthest ? seen : furthest;
        } else {
            r = ratio_of(log_ratio, k3);
        }
        approx_kl += on ? k3 : T(0);
        ratio += on ? r : T(0);
        const T seen = on ? r : T(-kInf);
        ratio_max = seen > ratio_max ? seen : ratio_max;
        ratios[k] = r;
    }
    if (furthest >= T(0.5)) return false;
    const T low = options.low, high = options.high, dual_clip = options.dual_clip, tau_pos = options.tau_pos,
            tau_neg = options.tau_neg;
#pragma omp simd reduction(+ : policy, clipped)
    for (int64_t k = 0; k < n; ++k) {
        const bool on = mask[k] != 0;
        const T log_ratio = kNear ? T(0) : current[k] - old[k];
        T by_logp, is_clipped = 0, value;
        if constexpr (kTerm == kCispoTerm)
            value = cispo_term(ratios[k], logp[k], advantage[k], high, by_logp, is_clipped);
        else if constexpr (kTerm == kSapoTerm)
            value = sapo_term(log_ratio, ratios[k], advantage[k], tau_pos, tau_neg, by_logp);
        else
            value = ppo_term<kTerm == kDualTerm>(log_ratio, ratios[k], advantage[k], low, high, dual_clip, by_logp,
                                                 is_clipped);
        policy += on ? value : T(0);
        clipped += on ? is_clipped : T(0);
        grad[k] = on ? weight * by_logp : T(0);
    }
    sums.policy += policy;
    sums.clipped += clipped;
    sums.approx_kl += approx_kl;
    sums.ratio += ratio;
    sums.ratio_max = maximum(double(ratio_max), sums.ratio_max);
    return true;
}

template <typename T, int kTerm>
void policy_block(const Tokens<T>& x, const PolicyOptions<T>& options, T weight, T* grad, PPOSums& sums) {
    if constexpr (sizeof(T) == sizeof(float))
        if (policy_block<T, true, kTerm>(x, options, weight, grad, sums)) return;
    policy_block<T, false, kTerm>(x, options, weight, grad, sums);
}

template <typename T>
void policy_block(const Tokens<T>& x, const PolicyOptions<T>& options, int term, T weight, T* grad, PPOSums& sums) {
    switch (term) {
        case kClipTerm:
            return policy_block<T, kClipTerm>(x, options, weight, grad, sums);
        case kDualTerm:
            return policy_block<T, kDualTerm>(x, options, weight, grad, sums);
        case kCispoTerm:
            return policy_block<T, kCispoTerm>(x, options, weight, grad, sums);
        default:
            return policy_block<T, kSapoTerm>(x, options, weight, grad, sums);
    }
}

// The sum of a block's KL terms. kByRatio: each term is multiplied by the token's ratio, through which its gradient
// flows too.
template <typename T, int kEstimator, bool kByRatio>
double kl_block(const Tokens<T>& x, const T* ref, T weight, T* grad) {
    const T limit = T(kMaxLogRatio);
    const T *logp = x.logp, *current = x.current, *old = x.old, *mask = x.on;
    T kl = 0;
#pragma omp simd reduction(+ : kl)
    for (int64_t k = 0; k < x.n; ++k) {
        const T d = logp[k] - ref[k], near = clamp(d, -limit, limit);
        T by_logp;
        T value = kl_term(near, kEstimator, by_logp);
        by_logp = near == d ? by_logp : T(0);
        if constexpr (kByRatio) weigh_by_ratio(current[k] - old[k], value, by_logp);
        const bool on = mask[k] != 0;
        kl += on ? value : T(0);
        grad[k] += on ? weight * by_logp : T(0);
    }
    return kl;
}

template <typename T, bool kByRatio>
double kl_block(const Tokens<T>& x, const T* ref, int estimator, T weight, T* grad) {
    switch (estimator) {
        case kK1:
            return kl_block<T, kK1, kByRatio>(x, ref, weight, grad);
        case kK2:
            return kl_block<T, kK2, kByRatio>(x, ref, weight, grad);
        case kK3:
            return kl_block<T, kK3, kByRatio>(x, ref, weight, grad);
        default:
            return kl_block<T, kAbs, kByRatio>(x, ref, weight, grad);
    }
}

// The mean of a row's log-ratios over its True tokens, whose number is `count`.
template <typename T>
double mean_log_ratio(const T* logp, const T* old_logp, const uint8_t* mask, int64_t n, double count) {
    double sum = 0;
    for (int64_t t = 0; t < n; ++t) sum += mask[t] ? double(logp[t]) - double(old_logp[t]) : 0.0;
    return count > 0 ? sum / count : 0;
}

template <typename T>
double masked_sum(const T* x, const T* mask, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) sum += mask[k] != 0 ? x[k] : T(0);
    return sum;
}

template <typename T>
void ppo(Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref, Pointer entropy,
         int64_t B, int64_t L, int objective, bool by_sequence, double clip_low, double clip_high, double dual_clip,
         double tau_pos, double tau_neg, double kl_coef, int estimator, bool kl_by_ratio, double entropy_coef,
         int reduction, double denominator, Pointer grad_logp, Pointer grad_entropy, Pointer stats, int threads) {
    std::vector<PPOSums> rows(B);
    double total = 0;
    for (int64_t b = 0; b < B; ++b) total += rows[b].count = double(count_true(mask.as<uint8_t>() + b * L, L));
    std::vector<double> weights(B);
    const PolicyOptions<T> options = {T(clip_low), T(clip_high), T(dual_clip), T(tau_pos), T(tau_neg)};
    const int term = objective == kCispo  ? kCispoTerm
                     : objective == kSapo ? kSapoTerm
                     : dual_clip > 0      ? kDualTerm
                                          : kClipTerm;
    const int team = team_size(4 * B * L, threads);  // 4: 60 instructions for 8 elements
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        PPOSums sums = rows[b];
        const double weight = weights[b] = token_weight(sums.count, total, double(B), reduction, denominator);
        T constant[kTokens], scratch[kTokens], on[kTokens], of_row[kTokens];
        const T zeros[kTokens] = {};
        if (!per_token)
            for (T& a : constant) a = advantages.as<T>()[b];
        if (by_sequence) {
            const T mean = T(mean_log_ratio(logp.as<T>() + b * L, old_logp.as<T>() + b * L, mask.as<uint8_t>() + b * L,
                                            L, sums.count));
            for (T& x : of_row) x = mean;
        }
        for (int64_t t = 0; t < L; t += kTokens) {
            const int64_t n = minimum(kTokens, L - t), i = b * L + t;
            widen_mask(mask.as<uint8_t>() + i, n, on);
            T* grad = grad_logp ? grad_logp.as<T>() + i : scratch;
            const T* own = logp.as<T>() + i;
            const Tokens<T> x = {own,
                                 by_sequence ? of_row : own,
                                 by_sequence ? zeros : old_logp.as<T>() + i,
                                 per_token ? advantages.as<T>() + i : constant,
                                 on,
                                 n};
            policy_block(x, options, term, T(weight), grad, sums);
            if (ref)
                sums.kl += (kl_by_ratio ? kl_block<T, true> : kl_block<T, false>)(x, ref.as<T>() + i, estimator,
                                                                                  T(weight * kl_coef), grad);
            if (entropy) sums.entropy += masked_sum(entropy.as<T>() + i, on, n);
            if (grad_entropy)
                for (int64_t k = 0; k < n; ++k)
                    grad_entropy.as<T>()[i + k] = on[k] != 0 ? T(-entropy_coef * weight) : T(0);
        }
        rows[b] = sums;
    }
    PPOSums all;
    for (int64_t b = 0; b < B; ++b) all.add(rows[b], weights[b]);
    all.write(stats.as<T>(), kl_coef, entropy_coef);
}

template <typename T>
void value_loss(Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n, double clip,
                double denominator, Pointer grad, Pointer stats, int threads) {
    const int64_t total = count_true(mask.as<uint8_t>(), n), blocks = (n + kTokens - 1) / kTokens;
    const double weight = token_weight(double(total), double(total), 1, kTokenMean, denominator);
    std::vector<double> partial(2 * blocks);
    const int team = team_size(n, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t i = block * kTokens, m = minimum(kTokens, n - i);
        const T *v = values.as<T>() + i, *old = old_values.as<T>() + i, *target = returns.as<T>() + i;
        T scratch[kTokens], on[kTokens], sum = 0, clipped = 0;
        widen_mask(mask.as<uint8_t>() + i, m, on);
        T* g = grad ? grad.as<T>() + i : scratch;
#pragma omp simd reduction(+ : sum, clipped)
        for (int64_t k = 0; k < m; ++k) {
            T by_value, is_clipped;
            const T value = value_term(v[k], old[k], target[k], T(clip), by_value, is_clipped);
            sum += on[k] != 0 ? value : T(0);
            clipped += on[k] != 0 ? is_clipped : T(0);
            g[k] = on[k] != 0 ? T(weight) * by_value : T(0);
        }
        partial[2 * block] = sum;
        partial[2 * block + 1] = clipped;
    }
    double sum = 0, clipped = 0;
    for (int64_t block = 0; block < blocks; ++block) {
        sum += partial[2 * block];
        clipped += partial[2 * block + 1];
    }
    stats.as<T>()[0] = T(weight * sum);
    stats.as<T>()[1] = T(total > 0 ? clipped / double(total) : 0);
}

template <typename T>
void reinforce(Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t L, int reduction,
               double denominator, Pointer grad, Pointer loss, int threads) {
    const int64_t total = count_true(mask.as<uint8_t>(), B * L);
    std::vector<double> rows(B);
    const int team = team_size(B * L, threads);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t b = 0; b < B; ++b) {
        const uint8_t* on = mask.as<uint8_t>() + b * L;
        const double weight = token_weight(double(count_true(on, L)), double(total), double(B), reduction, denominator);
        const T *lp = logp.as<T>() + b * L, *advantage = advantages.as<T>() + (per_token ? b * L : b);
        double sum = 0;
        for (int64_t t = 0; t < L; ++t) {
            const double a = advantage[per_token ? t : 0];
            sum -= on[t] ? a * double(lp[t]) : 0.0;
            if (grad) grad.as<T>()[b * L + t] = on[t] ? T(-weight * a) : T(0);
        }
        rows[b] = weight * sum;
    }
    double sum = 0;
    for (int64_t b = 0; b < B; ++b) sum += rows[b];
    loss.as<T>()[0] = T(sum);
}

}  // namespace

void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, int objective, bool by_sequence, double clip_low, double clip_high,
              double dual_clip, double tau_pos, double tau_neg, double kl_coef, int estimator, bool kl_by_ratio,
              double entropy_coef, int reduction, double denominator, Pointer grad_logp, Pointer grad_entropy,
              Pointer stats, int threads) {
    RLHF_BY_DTYPE(ppo, logp, old_logp, advantages, per_token, mask, ref, entropy, B, T, objective, by_sequence,
                  clip_low, clip_high, dual_clip, tau_pos, tau_neg, kl_coef, estimator, kl_by_ratio, entropy_coef,
                  reduction, denominator, grad_logp, grad_entropy, stats, threads);
}

void ppo_value_loss(int dtype, Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n,
                    double clip, double denominator, Pointer grad, Pointer stats, int threads) {
    RLHF_BY_DTYPE(value_loss, values, old_values, returns, mask, n, clip, denominator, grad, stats, threads);
}

void reinforce_loss(int dtype, Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t T,
                    int reduction, double denominator, Pointer grad, Pointer loss, int threads) {
    RLHF_BY_DTYPE(reinforce, logp, advantages, per_token, mask, B, T, reduction, denominator, grad, loss, threads);
}

}  // namespace rlhf::ISA
