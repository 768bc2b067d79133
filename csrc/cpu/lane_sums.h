// The innermost loop of the log-probabilities: sums of exponentials in the lanes of vector registers. The loop is
// written in the compiler's vectors, because registers limit it: with every constant in a register, and each power of
// two formed after its polynomial, the loop is a sixth faster than the vectoriser's.
#pragma once
#include "../math.h"
#ifdef __AVX512F__
#include "fine_sums.h"
#endif

namespace rlhf::ISA {
namespace {

constexpr int64_t kChunk = 1024;  // columns summed in the compute type; sums of chunks are added in double
constexpr int kLine = 16;         // logits per prefetch
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
constexpr float kMostSum = 256;   // a lane's largest sum, which bounds how far a logit lies above the shift
constexpr int64_t kAhead = 4096;  // bytes from the logits that are read to the logits that are fetched

// Fetches the line kAhead bytes after the logits that are read, because the processor's own prefetching does not keep
// up with long loops.
template <typename In>
inline void fetch(const In* from) {
    __builtin_prefetch(reinterpret_cast<const char*>(from) + kAhead);
}

template <typename T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
    typedef T unaligned __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};
typedef uint32_t Bits __attribute__((vector_size(kLanes * sizeof(uint32_t))));

// Sums of e = 2^(d factor) and of e d, with d = z - shift.
struct LaneSums {
    double sum[kLanes] = {}, centred[kLanes] = {};

    Softmax total(double shift, double factor) {
        for (int width = kLanes / 2; width > 0; width /= 2)
            for (int k = 0; k < width; ++k) {
                sum[k] += sum[k + width];
                centred[k] += centred[k + width];
            }
        return {shift, sum[0], centred[0] * factor / kLog2E};
    }
};

// Adds n logits, a multiple of kLine, and fetches their source kAhead. Without kWide, d is not clamped at kLowest,
// which saves an instruction in fifteen. The function then returns false and adds nothing if a power of two did not
// fit, or if a sum is so large that a logit may lie far above the shift. The argument is -shift, because an addition
// can take the logits from memory.
template <bool kWide, typename In, typename T>
__attribute__((noinline)) bool add_lines(const T* z, const In* source, int64_t n, T minus_shift, T factor,
                                         LaneSums& sums) {
    using Vector = typename VectorOf<T>::type;
    const Vector zero = {};
    Vector minus_shifts = zero + minus_shift, factors = zero + factor, lowest = zero + kLowest<T> / factor;
    Vector sum = zero, centred = zero;
    Vector round = zero + T(kPowerRound), c0 = zero + T(kExp2Slope[0]), c1 = zero + T(kExp2Slope[1]),
           c2 = zero + T(kExp2Slope[2]), c3 = zero + T(kExp2Slope[3]), c4 = zero + T(kExp2Slope[4]);
    Bits range = {};
#ifdef __AVX2__
    if constexpr (sizeof(T) == sizeof(float))  // values unknown to the compiler stay in registers
        asm("" : "+v"(minus_shifts), "+v"(factors), "+v"(round), "+v"(c0), "+v"(c1), "+v"(c2), "+v"(c3), "+v"(c4));
#endif
    for (int64_t i = 0; i < n; i += kLine) {
        fetch(source + i);
#pragma GCC unroll 2
        for (int k = 0; k < kLine; k += kLanes) {
            Vector d = *reinterpret_cast<const typename VectorOf<T>::unaligned*>(z + i + k) + minus_shifts, e;
            if constexpr (kWide) d = lowest > d ? lowest : d;
            if constexpr (sizeof(T) == sizeof(float)) {  // exp2_scaled
                Vector shifted = d * factors + round, f = d * factors + (round - shifted);
                if constexpr (!kWide) range |= (Bits)shifted;
                Vector slope = (((c0 * f + c1) * f + c2) * f + c3) * f + c4;
#ifdef __AVX2__
                asm("" : "+v"(slope), "+v"(shifted));  // forms the power after the polynomial
#endif
                const Vector power = (Vector)((Bits)shifted << 23);
                e = (power * f) * slope + power;
            } else {
                for (int lane = 0; lane < kLanes; ++lane) e[lane] = exp2_scaled(d[lane], factor);
            }
            sum += e;
            centred += e * d;
        }
    }
    bool fits = true;
    if constexpr (!kWide)
        for (int k = 0; k < kLanes; ++k) fits &= range[k] >> 8 == kPowerBits >> 8 && sum[k] <= kMostSum;
    if (!fits) return false;
    for (int k = 0; k < kLanes; ++k) {
        sums.sum[k] += double(sum[k]);
        sums.centred[k] += double(centred[k]);
    }
    return true;
}

// The same without kWide on half-precision logits as they are stored, where the instruction set has a loop for them. On
// floats that loop does not pay, because memory bounds both loops.
#ifdef __AVX512F__
template <typename In>
constexpr bool kReadsStored = sizeof(In) < sizeof(float);

template <typename In>
__attribute__((noinline)) bool add_stored(const In* source, int64_t n, float minus_shift, float factor,
                                          LaneSums& sums) {
    FineSums fine(minus_shift, factor);
    int64_t i = 0;
    for (; i + 2 * kLine <= n; i += 2 * kLine) {
        __m512 a, b;
        fetch(source + i);
        load_lines(source + i, a, b);
        fine.add(a);
        fine.add(b);
    }
    if (i < n) fine.add(load_line(source + i));
    if (!fine.fits(kMostSum)) return false;
    for (int k = 0; k < kLanes; ++k) {
        sums.sum[k] += double(fine.sum[k]);
        sums.centred[k] += double(fine.centred[k]);
    }
    return true;
}
#else
template <typename In>
constexpr bool kReadsStored = false;
#endif

}  // namespace
}  // namespace rlhf::ISA
