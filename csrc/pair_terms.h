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
    kDiscopop
};

// Loss of one pair, with derivatives by c and r. c and r are the log-ratios logp - ref_logp of the chosen and rejected
// answer. eps is the label smoothing. kIPO and kSigmoidNorm get log-ratios already divided by the lengths.
template <typename T>
RLHF_INLINE PairTerm<T> dpo_term(T c, T r, T beta, int type, T eps) {
    const T h = beta * (c - r), p = sigmoid(h), q = sigmoid(-h), log_p = log_sigmoid(h), log_q = log_sigmoid(-h);
    T value = 0, by_h = 0;  // set by the losses that depend on h alone
    switch (type) {
        case kSigmoid:
        case kSigmoidNorm:
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
        default: {  // kDiscopop, temperature 0.05
            const T tau = T(0.05), mix = sigmoid(h / tau), rest = sigmoid(-h / tau);
            const T e_mix = std::exp(-h - softplus(-h / tau));  // e^-h by itself overflows where mix is 0
            value = -log_p * rest + e_mix;
            by_h = e_mix * (rest / tau - 1) + mix * rest / tau * log_p - q * rest;
        }
    }
    return {value, beta * by_h, -beta * by_h};
}

// dpo_term of log-ratios summed over tokens. kIPO and kSigmoidNorm divide the sums by the lengths; a length of 0 is 1.
RLHF_INLINE PairTerm<double> dpo_pair(double c, double r, double c_length, double r_length, double beta, int type,
                                      double eps) {
    const bool average = type == kIPO || type == kSigmoidNorm;
    const double by_c = average ? maximum(c_length, 1.0) : 1, by_r = average ? maximum(r_length, 1.0) : 1;
    const PairTerm<double> term = dpo_term(c / by_c, r / by_r, beta, type, eps);
    return {term.value, term.grad_chosen / by_c, term.grad_rejected / by_r};
}

}  // namespace rlhf::ISA
