// How tensors store numbers: bfloat16, float16, float or double. The arithmetic runs in float; for doubles, in double.
#pragma once
#include <type_traits>

#include "../math.h"
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace rlhf::ISA {
namespace {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    uint16_t bits;
};

template <typename T>
inline T from_bits(uint32_t bits) {
    T x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

// The type in which the arithmetic runs.
template <typename In>
struct ComputeOf {
    using type = float;
};
template <>
struct ComputeOf<double> {
    using type = double;
};
template <typename In>
using Compute = typename ComputeOf<In>::type;

inline float widen(bfloat16 x) { return from_bits<float>(uint32_t(x.bits) << 16); }
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(float16 x) {
    const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
    const float scaled = from_bits<float>(magnitude) * 0x1p112f;  // rebiases the exponent, denormals included
    const uint32_t bits = magnitude >= 0x0f800000 ? magnitude | 0x7f800000 : to_bits(scaled);
    return from_bits<float>(bits | sign);
}

// Rounds once, to the nearest even number.
inline void narrow(float x, float& out) { out = x; }
inline void narrow(double x, double& out) { out = x; }
inline void narrow(float x, bfloat16& out) {
    const uint32_t bits = to_bits(x), rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    out.bits = uint16_t(x != x ? 0x7fc0 : rounded);
}
inline void narrow(float x, float16& out) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
    // Below 2^-14 the result is denormal. Adding 0.5 makes the float adder round at the last bit of the denormal.
    const uint32_t small = to_bits(from_bits<float>(magnitude) + 0.5f) - 0x3f000000;
    const uint32_t normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
    out.bits = uint16_t(sign | (magnitude < 0x38800000 ? small : magnitude < 0x47800000 ? normal : large));
}

template <typename In>
inline void load(const In* from, Compute<In>* to, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    if constexpr (std::is_same_v<In, float16>)  // the compiler does not choose these instructions by itself
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(from + i))));
#endif
#pragma omp simd
    for (int64_t k = i; k < n; ++k) to[k] = widen(from[k]);
}

template <typename In>
inline void store(const Compute<In>* from, In* to, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    if constexpr (std::is_same_v<In, float16>)
        for (; i + 8 <= n; i += 8) _mm_storeu_si128((__m128i*)(to + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0));
#endif
#pragma omp simd
    for (int64_t k = i; k < n; ++k) narrow(from[k], to[k]);
}

// Calls the function with a value of the storage type that the dtype code names.
template <typename Function>
inline auto with_storage(int dtype, Function function) {
    switch (dtype) {
        case 1:
            return function(bfloat16());
        case 2:
            return function(float16());
        case 3:
            return function(double());
        default:
            return function(float());
    }
}

// Calls the function with values of the storage types of logits and of their gradient: the same, or bfloat16 for the
// gradient by floats.
template <typename Function>
inline void with_gradient(int dtype, int grad_dtype, Function function) {
    if (dtype == 0 && grad_dtype == 1) return function(float(), bfloat16());
    with_storage(dtype, [&](auto storage) { function(storage, storage); });
}

}  // namespace
}  // namespace rlhf::ISA
