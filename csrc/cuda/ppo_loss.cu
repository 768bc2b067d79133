// Clipped policy, clipped value and REINFORCE losses: value, gradient and statistics in one pass over the tokens.
#include <type_traits>

#include "masked_loss.cuh"

namespace rlhf::cuda {
namespace {

// One advantage per token, or one advantage per row of row_length tokens.
template <typename T>
struct Advantages {
    const T* values;
    int64_t row_length;  // 0: per token
    __device__ T at(int64_t i) const { return values[row_length ? i / row_length : i]; }
};

struct LogRatios {
    double total = 0, count = 0;
    __device__ void operator+=(const LogRatios& other) {
        total += other.total;
        count += other.count;
    }
};

// kBySequence: every token has the ratio of its row, whose log is the mean of the row's log-ratios.
template <typename T, bool kBySequence>
struct PolicyLoss {
    const T *logp, *old_logp, *ref, *entropy;
    Advantages<T> advantages;
    PolicyOptions<T> options;
    double kl_coef, entropy_coef;
    int objective, estimator;
    bool kl_by_ratio;
    T *grad_logp, *grad_entropy, *loss, *stats;

    using Sums = PPOSums;
    using Row = T;  // the log-ratio of the row
    __device__ Row row(const uint8_t* mask, int64_t begin, int64_t length) const {
        if (!kBySequence) return 0;
        LogRatios sums;
        for (int64_t i = begin + threadIdx.x; i < begin + length; i += blockDim.x)
            if (mask[i]) sums += {double(logp[i]) - double(old_logp[i]), 1};
        sums = block_reduce(sums, Add());
        return sums.count > 0 ? T(sums.total / sums.count) : T(0);
    }
    struct Token {
        T logp, old_logp, advantage, ref, entropy;
    };
    __device__ Token load(int64_t i) const {
        return {logp[i], old_logp[i], advantages.at(i), ref ? ref[i] : T(0), entropy ? entropy[i] : T(0)};
    }
    __device__ T term(const Token& token, T log_ratio, T ratio, T& gradient, T& clipped) const {
        clipped = 0;
        if (objective == kCispo) return cispo_term(ratio, token.logp, token.advantage, options.high, gradient, clipped);
        if (objective == kSapo)
            return sapo_term(log_ratio, ratio, token.advantage, options.tau_pos, options.tau_neg, gradient);
        return ppo_term(log_ratio, ratio, token.advantage, options.low, options.high, options.dual_clip, gradient,
                        clipped);
    }
    __device__ void add(int64_t i, const Token& token, bool on, double weight, Row of_row, Sums& sums) const {
        T gradient = 0;
        if (on) {
            T approx_kl, clipped;
            const T log_ratio = kBySequence ? of_row : token.logp - token.old_logp;
            const T ratio = ratio_of(log_ratio, approx_kl);
            const T value = term(token, log_ratio, ratio, gradient, clipped);
            gradient *= T(weight);
            sums.policy += weight * double(value);
            sums.clipped += double(clipped);
            sums.approx_kl += double(approx_kl);
            sums.ratio += double(ratio);
            sums.ratio_max = maximum(double(ratio), sums.ratio_max);
            sums.count += 1;
            if (ref) {
                const T d = token.logp - token.ref, x = clamp(d, T(-kMaxLogRatio), T(kMaxLogRatio));
                T by_logp, kl = kl_term(x, estimator, by_logp);
                by_logp = x == d ? by_logp : T(0);
                if (kl_by_ratio) weigh_by_ratio(log_ratio, kl, by_logp);
                sums.kl += weight * double(kl);
                gradient += T(weight * kl_coef) * by_logp;
            }
            sums.entropy += weight * double(token.entropy);
        }
        if (grad_logp) grad_logp[i] = gradient;
        if (grad_entropy) grad_entropy[i] = on ? T(-entropy_coef * weight) : T(0);
    }
    __device__ void write(const Sums& sums) const {
        sums.write(stats, kl_coef, entropy_coef);
        loss[0] = stats[0];
    }
};

template <typename T>
struct ClippedValueLoss {
    const T *values, *old_values, *returns;
    T clip;
    T *grad, *loss, *stats;

    struct Sums {
        double loss = 0, clipped = 0, count = 0;
        __device__ void operator+=(const Sums& other) {
            loss += other.loss;
            clipped += other.clipped;
            count += other.count;
        }
    };
    struct Token {
        T value, old_value, target;
    };
    using Row = Nothing;
    __device__ Row row(const uint8_t*, int64_t, int64_t) const { return {}; }
    __device__ Token load(int64_t i) const { return {values[i], old_values[i], returns[i]}; }
    __device__ void add(int64_t i, const Token& token, bool on, double weight, Row, Sums& sums) const {
        T by_value, clipped;
        const T value = value_term(token.value, token.old_value, token.target, clip, by_value, clipped);
        if (on) {
            sums.loss += weight * double(value);
            sums.clipped += double(clipped);
            sums.count += 1;
        }
        if (grad) grad[i] = on ? T(weight) * by_value : T(0);
    }
    __device__ void write(const Sums& sums) const {
        loss[0] = stats[0] = T(sums.loss);
        stats[1] = T(sums.count > 0 ? sums.clipped / sums.count : 0);
    }
};

template <typename T>
struct ReinforceLoss {
    const T* logp;
    Advantages<T> advantages;
    T *grad, *loss;

    using Sums = double;
    struct Token {
        T logp, advantage;
    };
    using Row = Nothing;
    __device__ Row row(const uint8_t*, int64_t, int64_t) const { return {}; }
    __device__ Token load(int64_t i) const { return {logp[i], advantages.at(i)}; }
    __device__ void add(int64_t i, const Token& token, bool on, double weight, Row, Sums& sum) const {
        const double slope = -weight * double(token.advantage);
        if (on) sum += slope * double(token.logp);
        if (grad) grad[i] = on ? T(slope) : T(0);
    }
    __device__ void write(Sums sum) const { loss[0] = T(sum); }
};

template <typename T>
void launch_policy(Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
                   Pointer entropy, int64_t B, int64_t L, int objective, bool by_sequence, double clip_low,
                   double clip_high, double dual_clip, double tau_pos, double tau_neg, double kl_coef, int estimator,
                   bool kl_by_ratio, double entropy_coef, int reduction, double denominator, Pointer normalizer,
                   Pointer grad_logp, Pointer grad_entropy, Pointer loss, Pointer stats, Pointer scratch,
                   Pointer stream) {
    const PolicyOptions<T> options = {T(clip_low), T(clip_high), dual_clip > 0 ? T(dual_clip) : T(kInf), T(tau_pos),
                                      T(tau_neg)};
    const auto run = [&](const auto& terms) {
        launch_masked("ppo_loss", terms, mask, B, L, reduction, denominator, normalizer, scratch, stream, by_sequence);
    };
    const auto terms = [&](auto of_sequences) {
        return PolicyLoss<T, decltype(of_sequences)::value>{logp.as<const T>(),
                                                            old_logp.as<const T>(),
                                                            ref.as<const T>(),
                                                            entropy.as<const T>(),
                                                            {advantages.as<const T>(), per_token ? 0 : L},
                                                            options,
                                                            kl_coef,
                                                            entropy_coef,
                                                            objective,
                                                            estimator,
                                                            kl_by_ratio,
                                                            grad_logp.as<T>(),
                                                            grad_entropy.as<T>(),
                                                            loss.as<T>(),
                                                            stats.as<T>()};
    };
    if (by_sequence)
        run(terms(std::true_type()));
    else
        run(terms(std::false_type()));
}

template <typename T>
void launch_value(Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n, double clip,
                  double denominator, Pointer normalizer, Pointer grad, Pointer loss, Pointer stats, Pointer scratch,
                  Pointer stream) {
    const ClippedValueLoss<T> terms = {
        values.as<const T>(), old_values.as<const T>(), returns.as<const T>(), T(clip), grad.as<T>(), loss.as<T>(),
        stats.as<T>()};
    launch_masked("ppo_value_loss", terms, mask, 1, n, kTokenMean, denominator, normalizer, scratch, stream);
}

template <typename T>
void launch_reinforce(Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t L,
                      int reduction, double denominator, Pointer normalizer, Pointer grad, Pointer loss,
                      Pointer scratch, Pointer stream) {
    const ReinforceLoss<T> terms = {
        logp.as<const T>(), {advantages.as<const T>(), per_token ? 0 : L}, grad.as<T>(), loss.as<T>()};
    launch_masked("reinforce_loss", terms, mask, B, L, reduction, denominator, normalizer, scratch, stream);
}

}  // namespace

void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, int objective, bool by_sequence, double clip_low, double clip_high,
              double dual_clip, double tau_pos, double tau_neg, double kl_coef, int estimator, bool kl_by_ratio,
              double entropy_coef, int reduction, double denominator, Pointer normalizer, Pointer grad_logp,
              Pointer grad_entropy, Pointer loss, Pointer stats, Pointer scratch, Pointer stream) {
    RLHF_BY_DTYPE(launch_policy, logp, old_logp, advantages, per_token, mask, ref, entropy, B, T, objective,
                  by_sequence, clip_low, clip_high, dual_clip, tau_pos, tau_neg, kl_coef, estimator, kl_by_ratio,
                  entropy_coef, reduction, denominator, normalizer, grad_logp, grad_entropy, loss, stats, scratch,
                  stream);
}

void ppo_value_loss(int dtype, Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n,
                    double clip, double denominator, Pointer normalizer, Pointer grad, Pointer loss, Pointer stats,
                    Pointer scratch, Pointer stream) {
    RLHF_BY_DTYPE(launch_value, values, old_values, returns, mask, n, clip, denominator, normalizer, grad, loss, stats,
                  scratch, stream);
}

void reinforce_loss(int dtype, Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t T,
                    int reduction, double denominator, Pointer normalizer, Pointer grad, Pointer loss, Pointer scratch,
                    Pointer stream) {
    RLHF_BY_DTYPE(launch_reinforce, logp, advantages, per_token, mask, B, T, reduction, denominator, normalizer, grad,
                  loss, scratch, stream);
}

}  // namespace rlhf::cuda
