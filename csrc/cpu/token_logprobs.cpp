// log p(token) and entropy of softmax(logits / temperature). The forward pass passes over each row once; the backward
// pass reads and writes each row once.
#include <vector>

#include "ops.h"
#include "row.h"

namespace rlhf::ISA {
namespace {

template <typename In>
void write(Pointer logprobs, Pointer entropy, Pointer stats, int64_t i, const RowOutputs& row) {
    using T = Compute<In>;
    logprobs.as<T>()[i] = T(row.logprob);
    entropy.as<T>()[i] = T(row.entropy);
    stats.as<T>()[2 * i] = T(row.shift);
    stats.as<T>()[2 * i + 1] = T(row.log_sum);
}

template <typename In>
void forward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t N, int64_t V, double inv_temperature,
             double softcap, Pointer logprobs, Pointer entropy, Pointer stats, int threads) {
    const int team = team_size(N * V, threads);
    if (N >= team) {
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t i = 0; i < N; ++i) {
            RowOutputs row = {0, 0, 0, 0};
            if (ids[i] != kMasked) row = row_outputs_of(logits + i * row_stride, V, ids[i], inv_temperature, softcap);
            write<In>(logprobs, entropy, stats, i, row);
        }
        return;
    }
    // With fewer rows than threads, different threads take the segments of a row; the order of merging is the same.
    const int64_t segments = segments_of(V);
    std::vector<Softmax> states(N * segments);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t task = 0; task < N * segments; ++task) {
        const int64_t i = task / segments;
        if (ids[i] == kMasked) continue;
        states[task] = segment_state(logits + i * row_stride, task % segments, V, ids[i], inv_temperature, softcap);
    }
    for (int64_t i = 0; i < N; ++i) {
        RowOutputs row = {0, 0, 0, 0};
        if (ids[i] != kMasked) {
            Softmax others;
            for (int64_t s = 0; s < segments; ++s) others.merge(states[i * segments + s], inv_temperature);
            row = row_outputs(others, logit(logits + i * row_stride, ids[i], softcap), inv_temperature);
        }
        write<In>(logprobs, entropy, stats, i, row);
    }
}

// g = 2^(d factor) (slope d + offset), with d = z - shift.
template <typename T>
inline __attribute__((always_inline)) void gradients(const T* z, T* g, int n, T shift, T factor, T slope, T offset) {
    const T lowest = kLowest<T> / factor;
#pragma omp simd
    for (int k = 0; k < n; ++k) {
        T d = z[k] - shift;
        d = lowest > d ? lowest : d;
        g[k] = exp2_scaled(d, factor) * (slope * d + offset);
    }
}

// Gradient of the columns [begin, end) of one row: dz_j = gL (1[j = t] - p_j) - gH p_j (log p_j + H), then the chain
// rule through the temperature and the softcap. out may be the same memory as row, for a narrower Out too, because a
// block is written only after it has been read, onto numbers that have been read.
template <typename In, typename Out>
void row_gradient(const In* row, Out* out, int64_t begin, int64_t end, int64_t target, double inv_temperature,
                  double softcap, double logprob, double entropy, double shift, double log_sum, double grad_logprob,
                  double grad_entropy) {
    using T = Compute<In>;
    alignas(64) T buffer[kBlock], gradient[kBlock];
    // -p (gL + gH (log p + H)), where log p = (z - shift) / temperature - log_sum
    const T factor = T(inv_temperature * kLog2E), m = T(shift), cap_ = T(softcap);
    const double scale = -inv_temperature * std::exp(-log_sum);
    const T slope = T(scale * grad_entropy * inv_temperature),
            offset = T(scale * (grad_logprob + grad_entropy * (entropy - log_sum)));
    const bool has_target = target >= begin && target < end;
    const double z_t = has_target ? double(logit(row, target, softcap)) : 0;  // read before out may overwrite it
    for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = minimum(kBlock, end - i);
        const T* z = block(row + i, n, softcap, buffer);
        T* g = gradient;
        if constexpr (std::is_same_v<Out, T>) g = out + i;
        int64_t k = 0;
        for (; k + kLine <= n; k += kLine) {
            fetch(row + i + k);
            gradients(z + k, g + k, kLine, m, factor, slope, offset);
        }
        gradients(z + k, g + k, int(n - k), m, factor, slope, offset);
        if (softcap != 0) {
#pragma omp simd
            for (k = 0; k < n; ++k) g[k] *= 1 - (z[k] / cap_) * (z[k] / cap_);
        }
        if constexpr (!std::is_same_v<Out, T>) {
            asm volatile("" : : : "memory");  // because the compiler takes pointers of two types for two places
            store(gradient, out + i, n);
        }
    }
    if (!has_target) return;
    const double by_softcap = softcap == 0 ? 1 : 1 - (z_t / softcap) * (z_t / softcap);
    narrow(T(target_gradient(logprob, entropy, grad_logprob, grad_entropy) * inv_temperature * by_softcap),
           out[target]);
}

template <typename In, typename Out>
void backward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t N, int64_t V, double inv_temperature,
              double softcap, Pointer logprobs, Pointer entropy, Pointer stats, Pointer grad_logprobs,
              Pointer grad_entropy, Out* grad_logits, int64_t grad_row_stride, int threads) {
    using T = Compute<In>;
    // A narrower row that may lie over its logits is one task, because its segments need their order.
    const int64_t columns = std::is_same_v<In, Out> ? kSegment : V, segments = (V + columns - 1) / columns;
    const int team = team_size(N * V, threads);
    if ((const void*)grad_logits != logits && N > 0) prefer_huge_pages(grad_logits, (N - 1) * grad_row_stride + V);
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t task = 0; task < N * segments; ++task) {
        const int64_t i = task / segments, begin = task % segments * columns, end = minimum(begin + columns, V);
        Out* out = grad_logits + i * grad_row_stride;
        if (ids[i] == kMasked) {
            memset(out + begin, 0, size_t(end - begin) * sizeof(Out));
            continue;
        }
        row_gradient(logits + i * row_stride, out, begin, end, ids[i], inv_temperature, softcap,
                     double(logprobs.as<T>()[i]), double(entropy.as<T>()[i]), double(stats.as<T>()[2 * i]),
                     double(stats.as<T>()[2 * i + 1]), grad_logprobs ? double(grad_logprobs.as<T>()[i]) : 0.0,
                     grad_entropy ? double(grad_entropy.as<T>()[i]) : 0.0);
    }
}

}  // namespace

int64_t token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                       double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                       int threads) {
    const int64_t bad = first_bad_id(ids.as<const int64_t>(), N, V);
    if (bad >= 0) return bad;
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        forward(logits.as<const In>(), row_stride, ids.as<const int64_t>(), N, V, inv_temperature, softcap, logprobs,
                entropy, stats, threads);
    });
    return -1;
}

void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int grad_dtype,
                             int64_t grad_row_stride, int threads) {
    with_gradient(dtype, grad_dtype, [&](auto storage, auto gradient) {
        using In = decltype(storage);
        using Out = decltype(gradient);
        backward(logits.as<const In>(), row_stride, ids.as<const int64_t>(), N, V, inv_temperature, softcap, logprobs,
                 entropy, stats, grad_logprobs, grad_entropy, grad_logits.as<Out>(), grad_row_stride, threads);
    });
}

}  // namespace rlhf::ISA
