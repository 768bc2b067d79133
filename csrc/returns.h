// Returns and advantages: recurrences over time, the same recurrences as maps that compose, and moments that merge.
#pragma once
#include "math.h"

namespace rlhf::ISA {

// ---- recurrences over time, from a row's last step to its first

// The map x -> slope x + offset: a stretch of steps changes a sum to go by this map. The default is the map of a masked
// step, the identity.
struct Affine {
    double slope = 1, offset = 0;

    RLHF_INLINE double operator()(double x) const { return slope * x + offset; }
    // Applies this map, then the map of the stretch before it in time.
    RLHF_INLINE void then(const Affine& earlier) {
        offset = earlier(offset);
        slope *= earlier.slope;
    }
};

struct GAEState {
    double advantage = 0, next_value = 0;

    RLHF_INLINE void step(double reward, double value, double gamma, double lam) {
        advantage = (reward + gamma * next_value - value) + gamma * lam * advantage;
        next_value = value;
    }
};

// The map by which a stretch of steps changes GAE's state: advantage -> slope advantage + by_value next_value + offset,
// next_value -> value, the value of the stretch's first True step. The default is the map of masked steps, the
// identity.
struct GAEMap {
    double slope = 1, by_value = 0, offset = 0, value = 0;
    int64_t steps = 0;  // the number of True steps

    static RLHF_INLINE GAEMap of_step(double reward, double value, double gamma, double lam) {
        return {gamma * lam, gamma, reward - value, value, 1};
    }
    RLHF_INLINE GAEState operator()(GAEState state) const {
        if (steps == 0) return state;
        return {slope * state.advantage + by_value * state.next_value + offset, value};
    }
    // Applies this map, then the map of the stretch before it in time.
    RLHF_INLINE void then(const GAEMap& earlier) {
        if (earlier.steps == 0) return;
        if (steps == 0) {
            *this = earlier;
            return;
        }
        slope *= earlier.slope;
        by_value *= earlier.slope;
        offset = earlier.slope * offset + earlier.by_value * value + earlier.offset;
        value = earlier.value;
        steps += earlier.steps;
    }
};

// The order is that of REMAX_VARIANTS in rlhf_fast/ops/returns.py, because a kernel gets the index.
enum RemaxVariant { kOfficial, kPaper, kVerl };

// ---- moments

// Count, mean and sum of squared deviations of some numbers. Merging two parts loses no digits to a large mean (Chan,
// Golub and LeVeque 1979).
struct Moments {
    double count = 0, mean = 0, squares = 0;

    RLHF_INLINE void operator+=(const Moments& other) {
        const double n = count + other.count, d = other.mean - mean;
        if (other.count == 0) return;
        mean += d * (other.count / n);
        squares += other.squares + d * d * (count * other.count / n);
        count = n;
    }
    // 1 / sqrt(variance + 1e-8), with the unbiased variance.
    RLHF_INLINE double whitening_scale() const { return 1 / std::sqrt((count > 1 ? squares / (count - 1) : 0) + 1e-8); }
};

// GRPO's factor: 1 / (standard deviation of the group + 1e-4).
RLHF_INLINE double group_scale(double squares, int64_t group) {
    return 1 / (std::sqrt(squares / double(group - 1)) + 1e-4);
}

}  // namespace rlhf::ISA
