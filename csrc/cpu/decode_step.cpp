// Attention of one new token per row over the row's cached keys and values. The kernel applies the rotary embedding and
// writes the new key and value to the cache.
#include <vector>

#include "ops.h"
#include "row.h"

namespace rlhf::ISA {
namespace {

// x cos + (x's other half) sin, times scale. The sign of the first half is in sin. Without tables, x times scale.
template <typename In>
void rotated(const In* x, const float* cosine, const float* sine, int64_t D, float scale, float* out) {
    if (!cosine) {
#pragma omp simd
        for (int64_t i = 0; i < D; ++i) out[i] = widen(x[i]) * scale;
        return;
    }
    const int64_t half = D / 2;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        out[i] = (a * cosine[i] + b * sine[i]) * scale;
        out[i + half] = (b * cosine[i + half] + a * sine[i + half]) * scale;
    }
}

typedef VectorOf<float>::type Vector;

inline void widen_lanes(const float* x, Vector& to) { to = *reinterpret_cast<const VectorOf<float>::unaligned*>(x); }
#if defined(__AVX512F__)
template <typename In>
inline void widen_lanes(const In* x, Vector& to) {
    to = (Vector)load_line(x);
}
#elif defined(__AVX2__)
inline void widen_lanes(const bfloat16* x, Vector& to) {
    to = (Vector)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)x)), 16);
}
inline void widen_lanes(const float16* x, Vector& to) {
    to = (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)x));
}
#else
template <typename In>
inline void widen_lanes(const In* x, Vector& to) {
    for (int k = 0; k < kLanes; ++k) to[k] = widen(x[k]);
}
#endif

#ifdef __clang__
inline float total_of(const Vector& lanes) {
    float halves[kLanes];
    memcpy(halves, &lanes, sizeof halves);
    for (int width = kLanes / 2; width > 0; width /= 2)
        for (int k = 0; k < width; ++k) halves[k] += halves[k + width];
    return halves[0];
}
#else
// For each half, quarter, ... of a vector the lane that stands so far behind each lane, around the vector's end.
struct Turns {
    alignas(64) int32_t lanes[4][kLanes];
    constexpr Turns() : lanes() {
        for (int t = 0; t < 4; ++t)
            for (int k = 0; k < kLanes; ++k) lanes[t][k] = (k + (kLanes >> (t + 1))) % kLanes;
    }
};
constexpr Turns kTurns;

// The sum of a vector's lanes, half onto half.
inline float total_of(const Vector& lanes) {
    typedef int32_t Places __attribute__((vector_size(kLanes * sizeof(int32_t)), may_alias));
    Vector x = lanes;
#pragma GCC unroll 4
    for (int t = 0; kLanes >> (t + 1) > 0; ++t)
        x += __builtin_shuffle(x, *reinterpret_cast<const Places*>(kTurns.lanes[t]));
    return x[0];
}
#endif

// scores [kKeys] of one query x [D] with kKeys keys that stand one behind the other.
template <int kKeys, typename In>
inline void score(const float* x, const In* keys, int64_t D, float* scores) {
    Vector sums[kKeys] = {};
    int64_t i = 0;
    for (; i + kLanes <= D; i += kLanes) {
        Vector left, right;
        widen_lanes(x + i, left);
#pragma GCC unroll 4
        for (int k = 0; k < kKeys; ++k) {
            widen_lanes(keys + k * D + i, right);
            sums[k] += left * right;
        }
    }
#pragma GCC unroll 4
    for (int k = 0; k < kKeys; ++k) scores[k] = total_of(sums[k]);
    for (; i < D; ++i)
        for (int k = 0; k < kKeys; ++k) scores[k] += x[i] * widen(keys[k * D + i]);
}

// out [kVectors vectors] = the first columns of values [n, D], weighted, over total.
template <int kVectors, typename In>
inline void mix(const float* weights, const In* values, int64_t n, int64_t D, float total, float* out) {
    Vector sums[kVectors] = {};
    for (int64_t s = 0; s < n; ++s)
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            Vector right;
            widen_lanes(values + s * D + v * kLanes, right);
            sums[v] += weights[s] * right;
        }
    for (int v = 0; v < kVectors; ++v)
        *reinterpret_cast<VectorOf<float>::unaligned*>(out + v * kLanes) = sums[v] / total;
}

// Turns n scores into weights e^(score - largest score); returns the weights' sum.
float weigh(float* scores, int64_t n, float softcap) {
    if (softcap != 0) cap(scores, n, softcap);
    float top = -kInf;
#pragma omp simd reduction(max : top)
    for (int64_t s = 0; s < n; ++s) top = maximum(scores[s], top);
    const float lowest = kLowest<float> / float(kLog2E);
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < n; ++s) {
        scores[s] = exp2_scaled(maximum(scores[s] - top, lowest), float(kLog2E));
        sum += scores[s];
    }
    return sum;
}

template <typename In>
void attend(const In* heads, int64_t n, int64_t Q, int64_t K, int64_t D, const float* cosines, const float* sines,
            const int64_t* positions, const int64_t* starts, In* cache, int64_t S, int64_t slot, int64_t window,
            float scale, float softcap, In* out, int threads) {
    const int64_t group = Q / K;
    const int team = team_size(n * K * (slot + 1) * D, threads);
#pragma omp parallel num_threads(team)
    {
        std::vector<float> buffer(S + 2 * D);
        float *scores = buffer.data(), *x = scores + S, *sum = x + D;
#pragma omp for collapse(2) schedule(static)
        for (int64_t row = 0; row < n; ++row)
            for (int64_t k = 0; k < K; ++k) {
                const In* mine = heads + row * (Q + 2 * K) * D;
                const float* cosine = cosines ? cosines + positions[row] * D : nullptr;
                const float* sine = cosines ? sines + positions[row] * D : nullptr;
                In* keys = cache + (row * 2 * K + k) * S * D;
                In* values = keys + K * S * D;
                rotated(mine + (Q + k) * D, cosine, sine, D, 1.0f, x);
                for (int64_t i = 0; i < D; ++i) {
                    narrow(x[i], keys[slot * D + i]);
                    values[slot * D + i] = mine[(Q + K + k) * D + i];
                }
                const int64_t first = window > 0 ? maximum(starts[row], slot - window + 1) : starts[row];
                for (int64_t q = k * group; q < (k + 1) * group; ++q) {
                    rotated(mine + q * D, cosine, sine, D, scale, x);
                    const int64_t seen = slot + 1 - first;
                    const In *key = keys + first * D, *value = values + first * D;
                    int64_t s = 0, i = 0;
                    for (; s + 4 <= seen; s += 4) score<4>(x, key + s * D, D, scores + s);
                    for (; s < seen; ++s) score<1>(x, key + s * D, D, scores + s);
                    const float total = weigh(scores, seen, softcap);
                    for (; i + 4 * kLanes <= D; i += 4 * kLanes) mix<4>(scores, value + i, seen, D, total, sum + i);
                    for (; i + kLanes <= D; i += kLanes) mix<1>(scores, value + i, seen, D, total, sum + i);
                    for (; i < D; ++i) {
                        float rest = 0;
                        for (s = 0; s < seen; ++s) rest += scores[s] * widen(value[s * D + i]);
                        sum[i] = rest / total;
                    }
                    store(sum, out + (row * Q + q) * D, D);
                }
            }
    }
}

}  // namespace

void decode_attention(int dtype, Pointer heads, int64_t n, int64_t Q, int64_t K, int64_t D, Pointer cosines,
                      Pointer sines, Pointer positions, Pointer starts, Pointer cache, int64_t S, int64_t slot,
                      int64_t window, double scale, double softcap, Pointer out, int threads) {
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        if constexpr (!std::is_same_v<In, double>)
            attend(heads.as<const In>(), n, Q, K, D, cosines.as<const float>(), sines.as<const float>(),
                   positions.as<const int64_t>(), starts.as<const int64_t>(), cache.as<In>(), S, slot, window,
                   float(scale), float(softcap), out.as<In>(), threads);
        return 0;
    });
}

}  // namespace rlhf::ISA
