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
        for (int64_t i = 0; i < D; ++i) out[i] = widen(x[i]) * scale;
        return;
    }
    const int64_t half = D / 2;
    for (int64_t i = 0; i < half; ++i) {
        const float a = widen(x[i]), b = widen(x[i + half]);
        out[i] = (a * cosine[i] + b * sine[i]) * scale;
        out[i + half] = (b * cosine[i + half] + a * sine[i + half]) * scale;
    }
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
                    for (int64_t s = first; s <= slot; ++s) {
                        const In* key = keys + s * D;
                        float dot = 0;
#pragma omp simd reduction(+ : dot)
                        for (int64_t i = 0; i < D; ++i) dot += x[i] * widen(key[i]);
                        scores[s - first] = dot;
                    }
                    const float total = weigh(scores, slot + 1 - first, softcap);
                    for (int64_t i = 0; i < D; ++i) sum[i] = 0;
                    for (int64_t s = first; s <= slot; ++s) {
                        const float weight = scores[s - first];
                        const In* value = values + s * D;
#pragma omp simd
                        for (int64_t i = 0; i < D; ++i) sum[i] += weight * widen(value[i]);
                    }
                    for (int64_t i = 0; i < D; ++i) narrow(sum[i] / total, out[(row * Q + q) * D + i]);
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
