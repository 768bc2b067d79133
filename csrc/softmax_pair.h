// The online state of two rows of logits side by side. The state gives the rows' KL without cancellation. Shared by the
// CPU and CUDA kernels.
#pragma once
#include "math.h"

namespace rlhf::ISA {

// z_ref - z - centre. The difference of the logits comes with its rounding error (Knuth 1997, TAOCP 2, 4.2.2, theorem
// B), so that the digits of the smaller logit are there again where the centre cancels the larger one. For example,
// z = 1e6, z_ref = 0.3 and centre = -1e6 give 0.3. A centre near 0 cancels nothing (kNear), which saves six operations.
// Infinite logits give NaN or infinity. The values are numbers or vectors of numbers.
template <bool kNear = false, typename Values, typename T>
RLHF_INLINE void difference(const Values& z, const Values& z_ref, T centre, Values& u) {
    const Values apart = z_ref - z;
    u = apart - centre;
    if constexpr (!kNear) {
        const Values minus_z = apart - z_ref;
        u += (z_ref - (apart - minus_z)) - (z + minus_z);
    }
}
template <typename T>
RLHF_INLINE bool is_near_0(T centre) {
    return centre > T(-1) && centre < T(1);
}

// With u = (z_ref - z - centre) / temperature, the log-ratio q / p up to a constant,
//
//     KL(p || q) = sum p (log p - log q) = log E_p[e^u] - E_p[u] = log(1 + E_p[u] + E_p[e^u - 1 - u]) - E_p[u]
//
// for any centre. The last form is accurate however close p and q are, because every mean has the same errors of the
// weights e^(z - shift), and because e^u - 1 - u is a polynomial where u is small (`is_near`). Where u is not small,
// e^u may overflow (z is very low or -inf), so that the term e^u comes from the reference's own sum. The rounding of u
// is that of E_p|u|, which a centre near the mean keeps below 2 (1 + KL) or so (see `PairOutputs::off_centre`).
struct SoftmaxPair {
    Softmax policy, reference;     // `reference.centred` is not kept
    double cross = 0, excess = 0;  // sums over the policy's weights w: w u; w (e^u - 1 - u), or w (-1 - u) if far
    double far = 0;                // the reference's sum over the tokens whose u is not near 0
    bool unsupported = false;      // a token is possible under the policy and impossible under the reference

    RLHF_INLINE void move(double to, double reference_to, double inv_temperature) {
        if (policy.sum != 0 && to != policy.shift) {
            const double e = std::exp((policy.shift - to) * inv_temperature);
            cross = e == 0 ? 0 : cross * e;  // a sum beyond the largest float is infinite
            excess = e == 0 ? 0 : excess * e;
        }
        if (far != 0 && reference_to != reference.shift)
            far *= std::exp((reference.shift - reference_to) * inv_temperature);
        policy.move(to, inv_temperature);
        reference.move(reference_to, inv_temperature);
    }
    RLHF_INLINE void merge(SoftmaxPair other, double inv_temperature) {
        const double to = maximum(policy.shift, other.policy.shift),
                     reference_to = maximum(reference.shift, other.reference.shift);
        move(to, reference_to, inv_temperature);
        other.move(to, reference_to, inv_temperature);
        policy.sum += other.policy.sum;
        policy.centred += other.policy.centred;
        reference.sum += other.reference.sum;
        cross += other.cross;
        excess += other.excess;
        far += other.far;
        unsupported |= other.unsupported;
    }
    // E_p[u]
    RLHF_INLINE double mean() const { return policy.sum == 0 ? 0 : cross / policy.sum; }
    RLHF_INLINE double kl(double centre, double inv_temperature) const {
        if (policy.sum != policy.sum) return policy.sum;  // NaN: the policy has no distribution
        if (unsupported) return kInf;
        if (policy.sum == 0) return 0;
        double apart;  // log of the scales' ratio
        difference(policy.shift, reference.shift, centre, apart);
        apart *= inv_temperature;
        const double growth = (cross + excess + (far == 0 ? 0 : far * std::exp(apart))) / policy.sum;  // E_p[e^u] - 1
        // The terms of E_p[e^u] cancel where it is below 1/2 or the mean is large. A large E_p[e^u] may overflow, to
        // NaN too.
        const bool direct = !(growth >= -0.5 && growth < kInf && std::fabs(mean()) < 8);
        const double log_mean = direct ? std::log(reference.sum / policy.sum) + apart : std::log1p(growth);
        const double kl = log_mean - mean();
        return kl < 0 ? 0 : kl;
    }
};

// Bounds u by the largest number, because a logit of -inf makes u infinite or NaN, and 0 * inf is NaN.
template <typename T>
constexpr T kFarthest = T(1.7976931348623157e308);
template <>
inline constexpr float kFarthest<float> = 3.4028235e38f;
template <typename T>
RLHF_INLINE T bounded(T u) {
    u = u > -kFarthest<T> ? u : -kFarthest<T>;  // also bounds NaN
    return u < kFarthest<T> ? u : kFarthest<T>;
}

template <typename T>
RLHF_INLINE bool is_near(T u) {
    return u > T(-0.5) && u < T(0.5);
}

// The state of one token.
RLHF_INLINE SoftmaxPair pair_of(double z, double z_ref, double centre, double inv_temperature) {
    SoftmaxPair pair;
    pair.policy.shift = z;
    pair.reference.shift = z_ref;
    pair.policy.sum = z == -kInf ? 0 : 1;
    pair.reference.sum = pair.far = z_ref == -kInf ? 0 : 1;
    if (z == -kInf) return pair;
    pair.unsupported = z_ref == -kInf;
    difference(z, z_ref, centre, pair.cross);
    pair.cross = pair.unsupported ? 0 : pair.cross * inv_temperature;
    pair.excess = is_near(pair.cross) ? bregman(pair.cross) : -1 - pair.cross;
    if (is_near(pair.cross)) pair.far = 0;
    return pair;
}

struct PairOutputs {
    double logprob, entropy, kl, ref_logprob;
    double shift, log_sum, centre, mean;  // read by the gradient; the centre fits a T
    bool off_centre;                      // the sums have lost digits, and are to be made again about `centre`
};

// How often the sums of a row are made again at most. Every time leaves 1e-7 of the distance to the mean, or less.
constexpr int kRecentred = 6;

// The row's outputs from the state of all columns but the target.
template <typename T>
RLHF_INLINE PairOutputs pair_outputs(SoftmaxPair others, double z_t, double z_ref_t, double centre,
                                     double inv_temperature) {
    const RowOutputs row = row_outputs(others.policy, z_t, inv_temperature);
    const double ref_logprob = target_logprob(others.reference, z_ref_t, inv_temperature);
    others.merge(pair_of(z_t, z_ref_t, centre, inv_temperature), inv_temperature);
    const double kl = others.kl(centre, inv_temperature), mean = others.mean(),
                 moved = T(centre + mean / inv_temperature);
    // The gradient has the factor mean - u. The centre moves by the mean, so that little is left to cancel.
    const bool finite = kl < kInf && moved > -kInf && moved < kInf;
    const double on_mean = finite ? moved : centre;
    return {row.logprob,
            row.entropy,
            kl,
            ref_logprob,
            row.shift,
            row.log_sum,
            on_mean,
            kl < kInf ? mean + (centre - on_mean) * inv_temperature : kInf - kInf,
            finite && std::fabs(mean) > 8};
}

struct PairUpstream {
    double logprob, entropy, kl;
};

// Gradient of one row by its logits, from the last four numbers of the row's PairOutputs. With H the entropy,
//     dz_j = gL (1[j = t] - p_j) - gH p_j (log p_j + H) + gK p_j (log p_j - log q_j - KL),
// and log p_j - log q_j - KL = E_p[u] - u_j.
template <typename T>
struct PairGradient {
    // p_j is 2^(d_j factor), d = z - shift, times a factor that slope, offset and by_u contain.
    T shift, factor, lowest, slope, offset, by_u, centre;
    double mean;

    RLHF_INLINE PairGradient(const T* stats, double entropy, PairUpstream by, double inv_temperature)
        : shift(stats[0]),
          factor(T(inv_temperature * kLog2E)),
          lowest(kLowest<T> / factor),
          centre(stats[2]),
          mean(by.kl == 0 ? 0 : double(stats[3])) {
        const double log_sum = double(stats[1]), scale = -inv_temperature * std::exp(-log_sum);
        slope = T(scale * by.entropy * inv_temperature);
        offset = T(scale * (by.logprob + by.entropy * (entropy - log_sum) - by.kl * mean));
        by_u = T(scale * by.kl * inv_temperature);
    }
    template <bool kNear = false>
    RLHF_INLINE T at(T z, T z_ref) const {
        T d = z - shift, u;
        difference<kNear>(z, z_ref, centre, u);
        d = lowest > d ? lowest : d;
        const T w = exp2_scaled(d, factor);
        return w * (slope * d + offset) + (w * bounded(u)) * by_u;
    }
    RLHF_INLINE T at_target(T z, T z_ref, double logprob, double entropy, PairUpstream by,
                            double inv_temperature) const {
        const double p = std::exp(logprob);
        double gradient = target_gradient(logprob, entropy, by.logprob, by.entropy), u;
        difference(double(z), double(z_ref), double(centre), u);
        if (by.kl != 0 && !(p == 0)) gradient += by.kl * p * (mean - u * inv_temperature);
        return T(gradient * inv_temperature);
    }
};

// The gradient by the logits before their soft cap, from dz, the gradient by the capped logits z.
template <typename T>
RLHF_INLINE T through_softcap(T z, T dz, T softcap) {
    return softcap == 0 ? dz : dz * (1 - (z / softcap) * (z / softcap));
}

}  // namespace rlhf::ISA
