// Scalar maths shared by the CPU and CUDA kernels: exponentials, the online-softmax state, every loss term with its
// derivative. The functions are templates on float and double. A function that runs per token has no branches, so that
// loops over it vectorise. Everything is in namespace rlhf::ISA, because the linker keeps a single copy of a shared
// function and that copy might be compiled for an instruction set that the CPU lacks.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RLHF_INLINE __host__ __device__ __forceinline__
#else
#define RLHF_INLINE inline __attribute__((always_inline))
#endif

namespace rlhf::ISA {

constexpr double kInf = __builtin_huge_val();
constexpr double kLog2E = 1.4426950408889634;

template <typename T>
RLHF_INLINE T maximum(T a, T b) {
    return a > b ? a : b;  // b where a is NaN
}
template <typename T>
RLHF_INLINE T minimum(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
RLHF_INLINE T clamp(T x, T low, T high) {
    return x < low ? low : x > high ? high : x;  // keeps NaN
}

// ---- exponentials

// 2^kLowest is exactly 0. An exponent d is clamped at kLowest before exp2_scaled, and before 2^d is multiplied by d,
// because 0 * -inf is NaN.
template <typename T>
constexpr T kLowest = T(-1080);
template <>
inline constexpr float kLowest<float> = -127.0f;

// 1.5 * 2^23. The low mantissa bits of x + kRound + bias are the integer nearest to x, plus the bias.
constexpr float kRound = 12582912.0f;
constexpr float kPowerRound = kRound + 127;
// The bits of kRound. The bits of n + kPowerRound differ from kPowerBits in the low 8 bits only, for n from -127 to
// 128.
constexpr uint32_t kPowerBits = 0x4b400000;

// 2^n from n + kPowerRound, by a shift into the bits of the exponent. 2^-127 becomes 0 and 2^128 infinity.
RLHF_INLINE float power_of_2(float shifted) {
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    memcpy(&shifted, &bits, sizeof bits);
    return shifted;
}

// (2^f - 1) / f for |f| <= 1/2, by a minimax polynomial. The relative error of 2^f is 9e-8.
constexpr float kExp2Slope[5] = {1.3264659e-3f, 9.6715660e-3f, 5.5507344e-2f, 2.4022241e-1f, 6.9314698e-1f};
RLHF_INLINE float exp2_slope(float f) {
    float q = kExp2Slope[0];
    for (int j = 1; j < 5; ++j) q = q * f + kExp2Slope[j];
    return q;
}

// 2^(d * factor) for products from kLowest to 127. The function has few constants, because registers limit a loop over
// it.
RLHF_INLINE double exp2_scaled(double d, double factor) { return std::exp2(d * factor); }
RLHF_INLINE float exp2_scaled(float d, float factor) {
#ifdef __CUDA_ARCH__
    float power;  // one instruction with a relative error of 2^-22; a denormal result becomes 0
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(d * factor));
    return power;
#else
    const float shifted = d * factor + kPowerRound, f = d * factor + (kPowerRound - shifted),
                power = power_of_2(shifted);
    return (power * f) * exp2_slope(f) + power;
#endif
}

// e^x with a relative error of 2e-7. x = n ln2 + r, with ln2 in two parts; n times the first part is exact. The result
// is 2^(n - 1) times 2 * 2^f, because 2^n may exceed the largest float.
RLHF_INLINE double exp_of(double x) { return std::exp(x); }
RLHF_INLINE float exp_of(float x) {
#ifdef __CUDA_ARCH__
    return expf(x);
#else
    x = clamp(x, -87.33f, 89.4f);
    constexpr float round = kRound + 126;
    const float shifted = x * 1.44269504f + round, n = shifted - round;
    const float f = ((x - n * 0.693359375f) + n * 2.12194440e-4f) * 1.44269504f;
    return (exp2_slope(f) * (f + f) + 2.0f) * power_of_2(shifted);
#endif
}

// e^x - 1 - x for |x| < 1/2. x is a float or a vector of floats.
template <typename Floats>
RLHF_INLINE void near_bregman(const Floats& x, Floats& value) {
    Floats p = 2.48416795e-5f * x + 1.99619571e-4f;
    p = p * x + 1.38890401e-3f;
    p = p * x + 8.33318276e-3f;
    p = p * x + 4.16666643e-2f;
    p = p * x + 1.66666671e-1f;
    p = p * x + 0.5f;
    value = p * x * x;
}

// e^x - 1 - x without cancellation near 0. The k3 estimator is bregman(-d). The derivative is e^x - 1 = bregman(x) + x.
RLHF_INLINE float bregman(float x) {
    float near;
    near_bregman(x, near);
    const float far = (exp_of(x) - 1.0f) - x;
    return x > -0.5f && x < 0.5f ? near : far;
}
RLHF_INLINE double bregman(double x) {
    return std::fabs(x) < 1e-3 ? x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x / 120))) : std::expm1(x) - x;
}

RLHF_INLINE double tanh_of(double x) { return std::tanh(x); }

RLHF_INLINE float tanh_of(float x) {
    const float y = x < 0 ? -x : x, y2 = y * y;
    float p = -5.70493396e-3f;
    p = p * y2 + 2.06390419e-2f;
    p = p * y2 - 5.37397019e-2f;
    p = p * y2 + 1.33314420e-1f;
    p = p * y2 - 3.33332819e-1f;
    const float near = y + y * y2 * p, far = 1.0f - 2.0f / (exp_of(2.0f * y) + 1.0f);
    const float t = y < 0.625f ? near : far;
    return x < 0 ? -t : t;
}

template <typename T>
RLHF_INLINE T softplus(T x) {
    return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}
template <typename T>
RLHF_INLINE T log_sigmoid(T x) {
    return -softplus(-x);
}
template <typename T>
RLHF_INLINE T sigmoid(T x) {
    return x > 0 ? 1 / (1 + std::exp(-x)) : std::exp(x) / (1 + std::exp(x));
}

// ---- online softmax

// Sums of e^x (`sum`) and x e^x (`centred`) over logits z, with x = (z - shift) / temperature. The shift is near the
// largest logit.
struct Softmax {
    double shift = -kInf, sum = 0, centred = 0;

    RLHF_INLINE void move(double to, double inv_temperature) {
        if (sum != 0 && to != shift) {  // an empty sum may have shift -inf, and its step would be 0 * inf = NaN
            const double x = (shift - to) * inv_temperature, e = std::exp(x);
            centred = e == 0 ? 0 : e * (centred + sum * x);
            sum *= e;
        }
        shift = to;
    }
    RLHF_INLINE void merge(Softmax other, double inv_temperature) {
        if (other.shift > shift) move(other.shift, inv_temperature);
        other.move(shift, inv_temperature);
        sum += other.sum;
        centred += other.centred;
    }
    RLHF_INLINE double log_sum() const { return sum == 0 ? 0 : std::log(sum); }
};

// log p of the target, from its logit z_t and the state of all other tokens. log p = -log(1 + e^x), where x is the log
// of the others' weight over the target's weight. This form keeps its digits where z_t - logsumexp would round to 0.
RLHF_INLINE double target_logprob(const Softmax& others, double z_t, double inv_temperature) {
    if (z_t == -kInf) return others.sum == others.sum ? -kInf : others.sum;
    if (!(z_t < kInf)) return z_t - z_t;  // NaN: logits of NaN or +inf have no distribution
    if (others.sum == 0) return 0;
    return 0 - softplus((others.shift - z_t) * inv_temperature + std::log(others.sum));
}

struct RowOutputs {
    double logprob, entropy, shift, log_sum;
};

// The row's outputs from the state of all columns but the target. Beside a target that weighs 1, log_sum is log1p of
// the others' weight, so that the others, and the entropy of an almost certain token, keep their digits.
RLHF_INLINE RowOutputs row_outputs(const Softmax& others, double z_t, double inv_temperature) {
    Softmax all = others, target;
    target.shift = z_t;
    target.sum = z_t == -kInf ? 0.0 : 1.0;
    if (z_t > all.shift) all.move(z_t, inv_temperature);
    target.move(all.shift, inv_temperature);
    const double rest = all.sum;
    all.sum += target.sum;
    all.centred += target.centred;
    const double log_sum = target.sum == 1 ? std::log1p(rest) : all.log_sum();
    const double entropy = all.sum == 0 ? 0 : log_sum - all.centred / all.sum;
    // A row whose logits are all -inf has no finite shift. A shift of 0 keeps the backward pass finite.
    return {target_logprob(others, z_t, inv_temperature), entropy < 0 ? 0 : entropy, all.sum == 0 ? 0.0 : all.shift,
            log_sum};
}

// The gradient at the target is gL (1 - p) - gH p (log p + H). 1 - p is -expm1(log p), which is exact for p near 1.
RLHF_INLINE double target_gradient(double logprob, double entropy, double grad_logprob, double grad_entropy) {
    const double p = std::exp(logprob);
    return -grad_logprob * std::expm1(logprob) - (p == 0 ? 0.0 : grad_entropy * p * (logprob + entropy));
}

// ---- per-token loss terms: value and derivative by the log-prob

constexpr double kMaxLogRatio = 20;

// The order is that of ESTIMATORS in rlhf_fast/ops/kl.py, because a kernel gets the index (tests/core/test_order.py).
enum Estimator { kK1, kK2, kK3, kAbs };

// Each function below returns the term's value and writes the rest to references, because a loop over a function that
// returns a struct does not vectorise.

// KL estimate from d = logp - ref_logp, and its derivative by logp (Schulman 2020, "Approximating KL divergence").
template <typename T>
RLHF_INLINE T kl_term(T d, int estimator, T& grad) {
    if (estimator == kK1) {
        grad = 1;
        return d;
    }
    if (estimator == kK2) {
        grad = d;
        return d * d / 2;
    }
    if (estimator == kAbs) {
        grad = d > 0 ? T(1) : d < 0 ? T(-1) : d * 0;
        return d < 0 ? -d : d;
    }
    const T k3 = bregman(-d);
    grad = d - k3;
    return k3;
}

// The ratio r = e^x and approx_kl = r - 1 - x, where x is the log-ratio clamped to +-kMaxLogRatio.
template <typename T>
RLHF_INLINE T ratio_of(T log_ratio, T& approx_kl) {
    const T x = clamp(log_ratio, T(-kMaxLogRatio), T(kMaxLogRatio));
    approx_kl = bregman(x);
    return exp_of(x);
}
// ratio_of for |log_ratio| < 1/2, where the ratio needs no exponential.
template <typename T>
RLHF_INLINE T near_ratio_of(T log_ratio, T& approx_kl) {
    near_bregman(log_ratio, approx_kl);
    return T(1) + (log_ratio + approx_kl);
}

// The PPO term max(-A r, -A clip(r, 1 - low, 1 + high)). For A < 0 the dual clip bounds the term by -A dual_clip
// (infinity = off). Ties pass the gradients that torch passes: all of the gradient of -A r where r lies within the
// clip's bounds; half of it where the term equals the dual clip; all of it where the log-ratio equals +-kMaxLogRatio.
template <bool kDual = true, typename T>
RLHF_INLINE T ppo_term(T log_ratio, T r, T advantage, T low, T high, T dual_clip, T& grad, T& clipped) {
    const T limit = T(kMaxLogRatio), a = -advantage * r, b = -advantage * clamp(r, 1 - low, 1 + high);
    T value = a > b ? a : b, slope = b > a ? T(0) : a;
    clipped = b > a ? T(1) : T(0);
    if (kDual) {
        const T bound = advantage < 0 ? -advantage * dual_clip : T(kInf);
        slope = value < bound ? slope : value > bound ? T(0) : slope / 2;
        value = value > bound ? bound : value;
    }
    grad = log_ratio < -limit || log_ratio > limit ? T(0) : slope;
    return value;
}

// Multiplies a term by the ratio e^log_ratio; `grad`, the term's derivative by the log-prob, becomes the product's.
template <typename T>
RLHF_INLINE void weigh_by_ratio(T log_ratio, T& value, T& grad) {
    const T limit = T(kMaxLogRatio), x = clamp(log_ratio, -limit, limit), r = exp_of(x);
    grad = r * (grad + (x == log_ratio ? value : T(0)));
    value *= r;
}

// The order is that of OBJECTIVES in rlhf_fast/ops/policy_loss.py, because a kernel gets the index.
enum Objective { kClip, kCispo, kSapo };

// The bounds and temperatures of the terms. For kCispo `high` is the largest ratio itself.
template <typename T>
struct PolicyOptions {
    T low, high, dual_clip, tau_pos, tau_neg;
};

// CISPO's term -min(r, largest) A log p. Its weight min(r, largest) is a constant of the derivative.
template <typename T>
RLHF_INLINE T cispo_term(T r, T logp, T advantage, T largest, T& grad, T& clipped) {
    grad = -advantage * (r > largest ? largest : r);
    clipped = r > largest ? T(1) : T(0);
    return grad * logp;
}

// SAPO's term -A (4 / tau) sigmoid(tau (r - 1)), whose derivative by the log-prob is -A r at r = 1. tau has the sign's
// value of A.
template <typename T>
RLHF_INLINE T sapo_term(T log_ratio, T r, T advantage, T tau_pos, T tau_neg, T& grad) {
    const T limit = T(kMaxLogRatio), tau = advantage > 0 ? tau_pos : tau_neg;
    const T e = exp_of(-tau * (r - 1)), gate = 1 / (1 + e), slope = -4 * advantage * r * (e * gate) * gate;
    grad = log_ratio < -limit || log_ratio > limit ? T(0) : slope;
    return -4 * advantage * gate / tau;
}

// The value loss's term 0.5 max((v - R)^2, (clamp(v, old - clip, old + clip) - R)^2). A NaN in old is kept.
template <typename T>
RLHF_INLINE T value_term(T value, T old_value, T target, T clip, T& grad, T& clipped) {
    const T near = clamp(value, old_value - clip, old_value + clip), v = old_value == old_value ? near : old_value;
    const T a = (value - target) * (value - target), b = (v - target) * (v - target);
    const T grad_a = value - target, grad_b = v == value ? grad_a : T(0);
    grad = a > b ? grad_a : b > a ? grad_b : (grad_a + grad_b) / 2;
    clipped = b > a ? T(1) : T(0);
    return (a > b ? a : b) / 2;
}

// The order is that of REDUCTIONS in rlhf_fast/ops/policy_loss.py, because a kernel gets the index.
enum Reduction { kTokenMean, kSequenceMean, kSequenceSum, kConstant };

// The weight of each True token of a row in the loss. A denominator of 0 is derived from the mask's counts.
RLHF_INLINE double token_weight(double row_count, double total_count, double rows, int reduction, double denominator) {
    const double whole = denominator != 0 ? denominator : reduction == kTokenMean ? total_count : rows;
    if (row_count == 0 || whole == 0) return 0;
    return reduction == kSequenceMean ? 1 / (whole * row_count) : 1 / whole;
}

// Sums of the PPO loss's terms over True tokens. A row's sums of policy, kl and entropy are weighted when `add` adds
// them to the batch's sums.
struct PPOSums {
    double policy = 0, kl = 0, entropy = 0, clipped = 0, approx_kl = 0, ratio = 0, ratio_max = -kInf, count = 0;

    RLHF_INLINE void add(const PPOSums& row, double weight) {
        policy += weight * row.policy;
        kl += weight * row.kl;
        entropy += weight * row.entropy;
        clipped += row.clipped;
        approx_kl += row.approx_kl;
        ratio += row.ratio;
        ratio_max = maximum(row.ratio_max, ratio_max);
        count += row.count;
    }
    RLHF_INLINE void operator+=(const PPOSums& other) { add(other, 1); }
    template <typename T>
    RLHF_INLINE void write(T* stats, double kl_coef, double entropy_coef) const {
        const double n = count > 0 ? count : 1;
        stats[0] = T(policy + kl_coef * kl - entropy_coef * entropy);
        stats[1] = T(policy);
        stats[2] = T(clipped / n);
        stats[3] = T(approx_kl / n);
        stats[4] = T(ratio / n);
        stats[5] = count > 0 ? T(ratio_max) : T(0);
        stats[6] = T(kl);
        stats[7] = T(entropy);
    }
};

}  // namespace rlhf::ISA
