// The sums of a SoftmaxPair over two rows of logits, in one pass over both rows.
#pragma once
#include "../softmax_pair.h"
#include "row.h"

namespace rlhf::ISA {
namespace {

// exp2_scaled and bregman of math.h for vectors. Vectors are passed by reference, because the ABI of a returned vector
// depends on the instruction set.
template <typename T, typename Vector>
inline __attribute__((always_inline)) void powers_of(const Vector& d, T factor, Vector& power) {
    if constexpr (sizeof(T) == sizeof(float)) {
        const Vector shifted = d * factor + kPowerRound, f = d * factor + (kPowerRound - shifted);
        Vector slope = kExp2Slope[0] * f + kExp2Slope[1];
        for (int j = 2; j < 5; ++j) slope = slope * f + kExp2Slope[j];
        power = (Vector)((Bits)shifted << 23);
        power = (power * f) * slope + power;
    } else {
        for (int k = 0; k < kLanes; ++k) power[k] = exp2_scaled(d[k], factor);
    }
}
template <typename T, typename Vector>
inline __attribute__((always_inline)) void near_bregmans(const Vector& u, Vector& excess) {
    if constexpr (sizeof(T) == sizeof(float)) {
        near_bregman(u, excess);
    } else {
        for (int k = 0; k < kLanes; ++k) excess[k] = bregman(u[k]);
    }
}

template <typename Vector>
inline double total(const Vector& lanes) {
    double sums[kLanes];
    for (int k = 0; k < kLanes; ++k) sums[k] = double(lanes[k]);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) sums[k] += sums[k + width];
    return sums[0];
}

// Adds n tokens, a multiple of kLanes and at most kChunk, to a state that has these shifts. No logit lies above its
// row's shift. from and ref_from: the memory of the logits, fetched kAhead. kNear: the centre is near 0.
template <bool kNear, typename In, typename T>
__attribute__((noinline)) void add_pairs(const T* z, const T* z_ref, const In* from, const In* ref_from, int64_t n,
                                         T shift, T ref_shift, T centre, T inv_temperature, SoftmaxPair& state) {
    using Vector = typename VectorOf<T>::type;
    using Unaligned = typename VectorOf<T>::unaligned;
    const T factor = T(inv_temperature * kLog2E);
    const Vector zero = {}, lowest = zero + kLowest<T> / factor, farthest = zero + kFarthest<T>;
    Vector sum = zero, centred = zero, cross = zero, excess = zero, ref_sum = zero, far = zero, least = zero;
    for (int64_t i = 0; i < n; i += kLanes) {
        if (i % kLine == 0) {
            fetch(from + i);
            fetch(ref_from + i);
        }
        const Vector a = *reinterpret_cast<const Unaligned*>(z + i), b = *reinterpret_cast<const Unaligned*>(z_ref + i);
        Vector d = a - shift, d_ref = b - ref_shift, u;
        const Vector apart = b - a;
        difference<kNear>(a, b, centre, u);
        d = lowest > d ? lowest : d;
        d_ref = lowest > d_ref ? lowest : d_ref;
        least = apart < least ? apart : least;
        u *= inv_temperature;
        u = u > -farthest ? u : -farthest;  // also bounds the NaN of logits of -inf
        u = u < farthest ? u : farthest;
        Vector w, w_ref, e;
        powers_of(d, factor, w);
        powers_of(d_ref, factor, w_ref);
        near_bregmans<T>(u, e);
        const auto near = u * u < T(0.25);
        sum += w;
        centred += w * d;
        cross += w * u;
        excess += w * (near ? e : -1 - u);
        ref_sum += w_ref;
        far += near ? zero : w_ref;
    }
    state.policy.sum += total(sum);
    state.policy.centred += total(centred) * inv_temperature;
    state.reference.sum += total(ref_sum);
    state.cross += total(cross);
    state.excess += total(excess);
    state.far += total(far);
    bool endless = false;
    for (int k = 0; k < kLanes; ++k) endless |= least[k] == T(-kInf);
    if (endless)  // or the difference of two numbers overflows
        for (int64_t i = 0; i < n; ++i) state.unsupported |= z_ref[i] == T(-kInf) && z[i] > T(-kInf);
}

// The column of the largest logit other than the target's; the target's column where all others are -inf.
template <typename In>
int64_t largest_other(const In* row, int64_t V, int64_t target) {
    using T = Compute<In>;
    alignas(64) T buffer[kBlock];
    T top = T(-kInf);
    int64_t column = target;
    const auto search = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += kBlock) {
            const int64_t n = minimum(kBlock, to - i);
            const T here = max_of(block(row + i, n, 0, buffer), n);  // the softcap changes no order
            if (here > top) top = here, column = i;
        }
    };
    search(0, target);
    search(target + 1, V);
    if (top > T(-kInf))  // searches from the start of the block, which does not contain the target
        while (widen(row[column]) != top) ++column;
    return column;
}

// The result of a search of both rows before the sums. The search leaves the rows in the cache for the sums.
struct Start {
    double shift, ref_shift;  // near the largest logits without the target, beside which the others might vanish
    double centre;            // z_ref - z of the likeliest token: near the mean where p is peaked or close to q
};

template <typename In>
Start start_of(const In* row, const In* ref_row, int64_t V, int64_t target, double inv_temperature, double softcap) {
    const auto shift_at = [&](const In* from, int64_t column) {
        const double shift = shift_of(double(logit(from, column, softcap)), inv_temperature);
        return std::isfinite(shift) ? shift : 0;
    };
    const int64_t other = largest_other(row, V, target), ref_other = largest_other(ref_row, V, target);
    const int64_t likeliest = widen(row[target]) > widen(row[other]) ? target : other;
    const double centre = double(logit(ref_row, likeliest, softcap) - logit(row, likeliest, softcap));
    return {shift_at(row, other), shift_at(ref_row, ref_other), std::isfinite(centre) ? centre : 0};
}

// State of the columns [begin, end) without the target, about the shifts and the centre of `start`.
template <typename In>
SoftmaxPair accumulate_pair(const In* row, const In* ref_row, int64_t begin, int64_t end, int64_t target, Start start,
                            double inv_temperature, double softcap) {
    using T = Compute<In>;
    alignas(64) T buffer[kChunk], ref_buffer[kChunk];
    SoftmaxPair state;
    state.policy.shift = start.shift;
    state.reference.shift = start.ref_shift;
    const auto add = [&](const T* z, const T* z_ref, int64_t i, int64_t n) {
        const auto sums = is_near_0(start.centre) ? add_pairs<true, In, T> : add_pairs<false, In, T>;
        sums(z, z_ref, row + i, ref_row + i, n, T(start.shift), T(start.ref_shift), T(start.centre), T(inv_temperature),
             state);
    };
    const auto add_range = [&](int64_t from, int64_t to) {
        for (int64_t i = from; i < to; i += kChunk) {
            const int64_t n = minimum(kChunk, to - i), whole = n / kLanes * kLanes;
            const T* z = block(row + i, n, softcap, buffer);
            const T* z_ref = block(ref_row + i, n, softcap, ref_buffer);
            if (whole > 0) add(z, z_ref, i, whole);
            if (whole == n) continue;
            alignas(64) T rest[kLanes], ref_rest[kLanes];
            for (int k = 0; k < kLanes; ++k) {
                rest[k] = whole + k < n ? z[whole + k] : T(-kInf);
                ref_rest[k] = whole + k < n ? z_ref[whole + k] : T(-kInf);
            }
            add(rest, ref_rest, i + whole, kLanes);
        }
    };
    const bool split = target >= begin && target < end;
    add_range(begin, split ? target : end);
    if (split) add_range(target + 1, end);
    return state;
}

}  // namespace
}  // namespace rlhf::ISA
