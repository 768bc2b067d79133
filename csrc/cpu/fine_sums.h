// The innermost loop of the log-probabilities from half-precision logits on AVX-512: 2^(d factor) = 2^n 2^(j / 32) 2^(f
// / 32), with 32 d factor = 32 n + j + f. A register holds 16 of the 32 powers 2^(j / 32), and a polynomial of two
// terms does for |f| <= 1/2. The loop has 13 operations for 16 logits; the loop over kExp2Slope has 14. Logits are
// widened in registers.
#pragma once
#include "intrinsics.h"
#include "storage.h"

namespace rlhf::ISA {
namespace {

// The bits of the fraction of 2^(j / 32), less j << 18, because a shift by 18 puts j below the exponent n.
alignas(64) constexpr uint32_t kFractions[32] = {
    0x00000000, 0xfffecd87, 0xfffdaac3, 0xfffc980f, 0xfffb95c2, 0xfffaa43a, 0xfff9c3d3, 0xfff8f4f0,
    0xfff837f0, 0xfff78d3a, 0xfff6f532, 0xfff67043, 0xfff5fed7, 0xfff5a15b, 0xfff5583f, 0xfff523f6,
    0xfff504f3, 0xfff4fbaf, 0xfff508a4, 0xfff52c4d, 0xfff5672a, 0xfff5b9be, 0xfff6248c, 0xfff6a81e,
    0xfff744fd, 0xfff7fbb8, 0xfff8ccdf, 0xfff9b907, 0xfffac0c7, 0xfffbe4ba, 0xfffd257d, 0xfffe83b3};
// (2^(f / 32) - 1) / f, with a relative error of 2^(f / 32) of 6e-8.
constexpr float kFineSlope[2] = {2.34596198e-04f, 2.16611670e-02f};
// x + kFineRound has the integer nearest to x, plus 127 for the exponent's bias, in its low bits.
constexpr float kFineRound = kRound + 127 * 32;
constexpr int kFineBits = 13;  // 8 of n, 5 of j

// 32 logits in two vectors, in any order, or 16 in one.
inline void load_lines(const bfloat16* from, __m512& a, __m512& b) {
    const __m512i pairs = _mm512_loadu_si512(from);
    a = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    b = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000))));
}
inline void load_lines(const float16* from, __m512& a, __m512& b) {
    a = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from));
    b = _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)(from + 16)));
}
inline __m512 load_line(const bfloat16* from) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}
inline __m512 load_line(const float16* from) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)from)); }

struct FineSums {
    __m512 minus_shift, factor, sum = _mm512_setzero_ps(), centred = _mm512_setzero_ps();
    __m512 low = _mm512_load_ps(kFractions), high = _mm512_load_ps(kFractions + 16), round = _mm512_set1_ps(kFineRound),
           c0 = _mm512_set1_ps(kFineSlope[0]), c1 = _mm512_set1_ps(kFineSlope[1]);
    __m512i expected = _mm512_set1_epi32(kPowerBits), outside = _mm512_setzero_si512();

    RLHF_INLINE FineSums(float minus_shift_, float factor_)
        : minus_shift(_mm512_set1_ps(minus_shift_)), factor(_mm512_set1_ps(32 * factor_)) {
        // values unknown to the compiler stay in registers
        asm("" : "+v"(low), "+v"(high), "+v"(round), "+v"(c0), "+v"(c1), "+v"(expected), "+v"(factor));
    }
    RLHF_INLINE void add(__m512 z) {
        const __m512 d = _mm512_add_ps(z, minus_shift), shifted = _mm512_fmadd_ps(d, factor, round),
                     f = _mm512_fmadd_ps(d, factor, _mm512_sub_ps(round, shifted));
        const __m512i bits = _mm512_castps_si512(shifted);
        outside = _mm512_ternarylogic_epi32(outside, bits, expected, 0xf6);  // outside | (bits ^ expected)
        const __m512i fraction = _mm512_castps_si512(_mm512_permutex2var_ps(low, bits, high));
        const __m512 power = _mm512_castsi512_ps(_mm512_add_epi32(fraction, _mm512_slli_epi32(bits, 18)));
        const __m512 e = _mm512_fmadd_ps(_mm512_mul_ps(power, f), _mm512_fmadd_ps(c0, f, c1), power);
        sum = _mm512_add_ps(sum, e);
        centred = _mm512_fmadd_ps(e, d, centred);
    }
    // Whether all powers were normal numbers, and no lane's sum is so large that a logit may lie far above the shift.
    bool fits(float most_sum) const {
        return _mm512_test_epi32_mask(outside, _mm512_set1_epi32(~0u << kFineBits)) == 0 &&
               _mm512_cmp_ps_mask(sum, _mm512_set1_ps(most_sum), _CMP_LE_OQ) == 0xffff;
    }
};

}  // namespace
}  // namespace rlhf::ISA
