// Losses on pairs of answers, with their derivatives: Bradley-Terry, DPO and DPO's variants.
#pragma once
#include "math.h"

namespace rlhf::ISA {

// -log sigmoid(x), the Bradley-Terry negative log-likelihood of a pair whose scores differ by x.
template <typename T>
RLHF_INLINE T bradley_terry(T x, T& grad) {
    grad = -sigmoid(-x);
    return softplus(-x);
}

// A pair's accuracy: 1 for the right order, 1/2 for a tie, 0 for the wrong order.
RLHF_INLINE double order(double difference) { return difference > 0 ? 1 : difference == 0 ? 0.5 : 0; }

struct RewardSums {
    double likelihood = 0, centre = 0, right = 0, difference = 0;

    // Adds a pair. The gradients by both scores are those of a sum over pairs; the caller divides by their number.
    RLHF_INLINE void add(double chosen, double rejected, double margin, double center_coef, double& grad_chosen,
                         double& grad_rejected) {
        const double d = chosen - rejected, centre_of = chosen + rejected, by_centre = 2 * center_coef * centre_of;
        double by_difference = 0;
        likelihood += bradley_terry(d - margin, by_difference);
        centre += centre_of * centre_of;
        right += order(d);
        difference += d;
        grad_chosen = by_difference + by_centre;
        grad_rejected = by_centre - by_difference;
    }
    RLHF_INLINE void operator+=(const RewardSums& other) {
        likelihood += other.likelihood;
        centre += other.centre;
        right += other.right;
        difference += other.difference;
    }
    template <typename T>
    RLHF_INLINE void write(T* stats, double pairs, double center_coef) const {
        stats[0] = T((likelihood + center_coef * centre) / pairs);
        stats[1] = T(right / pairs);
        stats[2] = T(difference / pairs);
        stats[3] = T(likelihood / pairs);
    }
};

// Whether answer i of a row is ranked above answer j. A negative rank marks a place without an answer.
RLHF_INLINE bool ranked_above(const int64_t* ranks, int64_t i, int64_t j) {
    return ranks[i] >= 0 && ranks[i] < ranks[j];
}

template <typename T>
struct PairTerm {
    T value, grad_chosen, grad_rejected;
};

// The order is that of LOSS_TYPES in rlhf_fast/ops/preference.py, because a kernel gets the index.
enum DPOType {
    kSigmoid,
    kRobust,
    kHinge,
    kIPO,
    kExoPair,
    kNcaPair,
    kApoZero,
    kApoDown,
    kSigmoidNorm,
    kSppoHard,
    kDiscopop,
    kBcoPair,
    kSft,
    kCpo,
    kSimpo,
    kOddsRatio
};

// log(1 - e^x) for x < 0, with all its digits at both ends.
template <typename T>
RLHF_INLINE T log1mexp(T x) {
    return x > T(-0.6931471805599453) ? std::log(-std::expm1(x)) : std::log1p(-std::exp(x));
}

// ORPO's term -log sigmoid(log odds(c) - log odds(r)) of average log-probs, odds(x) = e^x / (1 - e^x). An average above
// -1e-7 counts as -1e-7, because the odds of a certain answer are infinite.
template <typename T>
RLHF_INLINE PairTerm<T> odds_ratio(T c, T r) {
    c = c > T(-1e-7) ? T(-1e-7) : c;
    r = r > T(-1e-7) ? T(-1e-7) : r;
    const T c_rest = log1mexp(c), r_rest = log1mexp(r), log_odds = (c - r) - (c_rest - r_rest);
    const T lost = log_sigmoid(-log_odds);
    return {softplus(-log_odds), -std::exp(lost - c_rest), std::exp(lost - r_rest)};
}

// Loss of one pair, with derivatives by c and r. c and r are the log-ratios logp - ref_logp of the chosen and rejected
// answer, or their log-probs where the loss has no reference. eps is the label smoothing, margin SimPO's gamma. The
// losses that `averages` says get numbers already divided by the lengths.
template <typename T>
RLHF_INLINE PairTerm<T> dpo_term(T c, T r, T beta, int type, T eps, T margin) {
    const T h = beta * (c - r) - (type == kSimpo ? margin : T(0)), p = sigmoid(h), q = sigmoid(-h),
            log_p = log_sigmoid(h), log_q = log_sigmoid(-h);
    T value = 0, by_h = 0;  // set by the losses that depend on h alone
    switch (type) {
        case kSigmoid:
        case kSigmoidNorm:
        case kCpo:
        case kSimpo:
            value = -(1 - eps) * log_p - eps * log_q;
            by_h = -(1 - eps) * q + eps * p;
            break;
        case kRobust:
            value = (-(1 - eps) * log_p + eps * log_q) / (1 - 2 * eps);
            by_h = (-(1 - eps) * q - eps * p) / (1 - 2 * eps);
            break;
        case kHinge:
            value = h < 1 ? 1 - h : h - h;
            by_h = h < 1 ? T(-1) : T(0);
            break;
        case kIPO: {
            const T error = (c - r) - 1 / (2 * beta);
            return {error * error, 2 * error, -2 * error};
        }
        case kExoPair: {
            const T on_p = log_p - std::log1p(-eps), on_q = log_q - std::log(eps);
            value = p * on_p + q * on_q;
            by_h = p * q * (on_p - on_q);  // dp/dh = p q; the derivatives of log p and log q cancel
            break;
        }
        case kNcaPair: {
            const T a = beta * c, b = beta * r;
            return {softplus(-a) + (softplus(a) + softplus(b)) / 2, beta * (sigmoid(a) / 2 - sigmoid(-a)),
                    beta * sigmoid(b) / 2};
        }
        case kApoZero: {
            const T a = beta * c, b = beta * r;
            return {sigmoid(-a) + sigmoid(b), -beta * sigmoid(a) * sigmoid(-a), beta * sigmoid(b) * sigmoid(-b)};
        }
        case kApoDown: {
            const T a = beta * c;
            return {sigmoid(a) + q, beta * (sigmoid(a) * sigmoid(-a) - p * q), beta * p * q};
        }
        case kSppoHard: {
            const T win = c - 1 / (2 * beta), lose = r + 1 / (2 * beta);
            return {win * win + lose * lose, 2 * win, 2 * lose};
        }
        case kBcoPair: {
            const T a = beta * c, b = beta * r;
            return {softplus(-a) + softplus(b), -beta * sigmoid(-a), beta * sigmoid(b)};
        }
        case kSft:
            return {-c, T(-1), T(0)};
        case kOddsRatio: {
            const PairTerm<T> term = odds_ratio(c, r);
            return {beta * term.value, beta * term.grad_chosen, beta * term.grad_rejected};
        }
        default: {  // kDiscopop, temperature 0.05
            const T tau = T(0.05), mix = sigmoid(h / tau), rest = sigmoid(-h / tau);
            const T e_mix = std::exp(-h - softplus(-h / tau));  // e^-h by itself overflows where mix is 0
            value = -log_p * rest + e_mix;
            by_h = e_mix * (rest / tau - 1) + mix * rest / tau * log_p - q * rest;
        }
    }
    return {value, beta * by_h, -beta * by_h};
}

// Whether a loss takes averages over tokens.
RLHF_INLINE bool averages(int type) {
    return type == kIPO || type == kSigmoidNorm || type == kSft || type == kSimpo || type == kOddsRatio;
}

struct PairOutcome {
    PairTerm<double> term;
    double chosen_reward, rejected_reward;
};

// dpo_term of log-ratios summed over tokens, and the rewards. Sums are divided by the lengths where the loss averages;
// a length below 1 is 1. The rewards of the losses without a reference are averages where the loss is.
RLHF_INLINE PairOutcome dpo_pair(double c, double r, double c_length, double r_length, double beta, int type,
                                 double eps, double margin) {
    const bool average = averages(type), rewarded = type == kSimpo || type == kOddsRatio;
    const double by_c = average ? maximum(c_length, 1.0) : 1, by_r = average ? maximum(r_length, 1.0) : 1;
    const PairTerm<double> term = dpo_term(c / by_c, r / by_r, beta, type, eps, margin);
    return {{term.value, term.grad_chosen / by_c, term.grad_rejected / by_r},
            beta * (rewarded ? c / by_c : c),
            beta * (rewarded ? r / by_r : r)};
}

}  // namespace rlhf::ISA
