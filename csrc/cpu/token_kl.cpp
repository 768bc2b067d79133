// log p(token), the entropy of p and KL(p || q), with p = softmax(logits / temperature) and q = softmax(ref_logits /
// temperature). The forward pass passes over both rows once; the backward pass reads both rows once and writes one.
#include <vector>

#include "ops.h"
#include "pair_sums.h"

namespace rlhf::ISA {
namespace {

// Two tensors of the same shape [N, V] and dtype, each with its own row stride, and the token ids of the rows.
template <typename In>
struct Rows {
    const In *logits, *ref_logits;
    int64_t stride, ref_stride, V;
    const int64_t* ids;
    double inv_temperature, softcap;

    const In* policy(int64_t i) const { return logits + i * stride; }
    const In* reference(int64_t i) const { return ref_logits + i * ref_stride; }
    Start start(int64_t i) const { return start_of(policy(i), reference(i), V, ids[i], inv_temperature, softcap); }
    SoftmaxPair segment(int64_t i, int64_t s, Start start) const {
        const int64_t begin = s * kSegment, end = minimum(begin + kSegment, V);
        return accumulate_pair(policy(i), reference(i), begin, end, ids[i], start, inv_temperature, softcap);
    }
    PairOutputs outputs(int64_t i, SoftmaxPair others, Start start) const {
        for (int again = kRecentred;; --again) {
            const PairOutputs row =
                pair_outputs<Compute<In>>(others, logit(policy(i), ids[i], softcap),
                                          logit(reference(i), ids[i], softcap), start.centre, inv_temperature);
            if (!row.off_centre || again == 0) return row;
            start.centre = row.centre;
            others = sums(i, start);
        }
    }
    SoftmaxPair sums(int64_t i, Start start) const {
        SoftmaxPair others;
        for (int64_t s = 0; s < segments_of(V); ++s) others.merge(segment(i, s, start), inv_temperature);
        return others;
    }
};

template <typename T>
void write(Pointer logprobs, Pointer entropy, Pointer kl, Pointer ref_logprobs, Pointer stats, int64_t i,
           const PairOutputs& row) {
    logprobs.as<T>()[i] = T(row.logprob);
    entropy.as<T>()[i] = T(row.entropy);
    kl.as<T>()[i] = T(row.kl);
    ref_logprobs.as<T>()[i] = T(row.ref_logprob);
    T* kept = stats.as<T>() + 4 * i;
    kept[0] = T(row.shift);
    kept[1] = T(row.log_sum);
    kept[2] = T(row.centre);
    kept[3] = T(row.mean);
}

template <typename In>
void forward(const Rows<In>& rows, int64_t N, Pointer logprobs, Pointer entropy, Pointer kl, Pointer ref_logprobs,
             Pointer stats, int threads) {
    using T = Compute<In>;
    const int64_t segments = segments_of(rows.V);
    const int team = team_size(N * rows.V, threads);
    if (N >= team) {
#pragma omp parallel for num_threads(team) schedule(static)
        for (int64_t i = 0; i < N; ++i) {
            PairOutputs row = {};
            if (rows.ids[i] != kMasked) {
                const Start start = rows.start(i);
                row = rows.outputs(i, rows.sums(i, start), start);
            }
            write<T>(logprobs, entropy, kl, ref_logprobs, stats, i, row);
        }
        return;
    }
    // With fewer rows than threads, different threads take the segments of a row; the order of merging is the same.
    std::vector<Start> starts(N);
    std::vector<SoftmaxPair> states(N * segments);
#pragma omp parallel num_threads(team)
    {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; ++i)
            if (rows.ids[i] != kMasked) starts[i] = rows.start(i);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < N * segments; ++task) {
            const int64_t i = task / segments;
            if (rows.ids[i] != kMasked) states[task] = rows.segment(i, task % segments, starts[i]);
        }
    }
    for (int64_t i = 0; i < N; ++i) {
        PairOutputs row = {};
        if (rows.ids[i] != kMasked) {
            SoftmaxPair others;
            for (int64_t s = 0; s < segments; ++s) others.merge(states[i * segments + s], rows.inv_temperature);
            row = rows.outputs(i, others, starts[i]);
        }
        write<T>(logprobs, entropy, kl, ref_logprobs, stats, i, row);
    }
}

// The gradient is passed by value, because the compiler must assume that g overwrites the members of a reference.
template <bool kNear, typename T>
inline void gradients_of(const T* z, const T* z_ref, T* g, int64_t n, PairGradient<T> row) {
#pragma omp simd
    for (int64_t k = 0; k < n; ++k) g[k] = row.template at<kNear>(z[k], z_ref[k]);
}

// Gradient of the columns [begin, end) of one row. out may be the same memory as row, for a narrower Out too, because a
// block is written only after it has been read, onto numbers that have been read.
template <typename In, typename Out, typename T>
void row_gradient(const In* row, const In* ref_row, Out* out, int64_t begin, int64_t end, int64_t target,
                  double inv_temperature, double softcap, double logprob, double entropy, const T* stats,
                  PairUpstream by) {
    alignas(64) T buffer[kBlock], ref_buffer[kBlock], gradients[kBlock];
    const PairGradient<T> gradient(stats, entropy, by, inv_temperature);
    const bool has_target = target >= begin && target < end;
    // The target's logits are read before out may overwrite them.
    const T z_t = has_target ? logit(row, target, softcap) : T(0),
            z_ref_t = has_target ? logit(ref_row, target, softcap) : T(0);
    for (int64_t i = begin; i < end; i += kBlock) {
        const int64_t n = minimum(kBlock, end - i);
        const T* z = block(row + i, n, softcap, buffer);
        const T* z_ref = block(ref_row + i, n, softcap, ref_buffer);
        T* g = gradients;
        if constexpr (std::is_same_v<Out, T>) g = out + i;
        is_near_0(gradient.centre) ? gradients_of<true>(z, z_ref, g, n, gradient)
                                   : gradients_of<false>(z, z_ref, g, n, gradient);
        if (softcap != 0) {
#pragma omp simd
            for (int64_t k = 0; k < n; ++k) g[k] = through_softcap(z[k], g[k], T(softcap));
        }
        if constexpr (!std::is_same_v<Out, T>) {
            asm volatile("" : : : "memory");  // because the compiler takes pointers of two types for two places
            store(gradients, out + i, n);
        }
    }
    if (!has_target) return;
    const T at_target = gradient.at_target(z_t, z_ref_t, logprob, entropy, by, inv_temperature);
    narrow(through_softcap(z_t, at_target, T(softcap)), out[target]);
}

template <typename In, typename Out>
void backward(const Rows<In>& rows, int64_t N, Pointer logprobs, Pointer entropy, Pointer stats, Pointer grad_logprobs,
              Pointer grad_entropy, Pointer grad_kl, Out* grad_logits, int64_t grad_stride, int threads) {
    using T = Compute<In>;
    // A narrower row that may lie over its logits is one task, because its segments need their order.
    const int64_t V = rows.V, columns = std::is_same_v<In, Out> ? kSegment : V, segments = (V + columns - 1) / columns;
    const int team = team_size(N * V, threads);
    if ((const void*)grad_logits != rows.logits && N > 0) prefer_huge_pages(grad_logits, (N - 1) * grad_stride + V);
    const auto upstream = [](Pointer grad, int64_t i) { return grad ? double(grad.as<T>()[i]) : 0.0; };
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t task = 0; task < N * segments; ++task) {
        const int64_t i = task / segments, begin = task % segments * columns, end = minimum(begin + columns, V);
        Out* out = grad_logits + i * grad_stride;
        if (rows.ids[i] == kMasked) {
            memset(out + begin, 0, size_t(end - begin) * sizeof(Out));
            continue;
        }
        row_gradient(rows.policy(i), rows.reference(i), out, begin, end, rows.ids[i], rows.inv_temperature,
                     rows.softcap, double(logprobs.as<T>()[i]), double(entropy.as<T>()[i]), stats.as<const T>() + 4 * i,
                     {upstream(grad_logprobs, i), upstream(grad_entropy, i), upstream(grad_kl, i)});
    }
}

template <typename In>
Rows<In> rows_of(Pointer logits, int64_t stride, Pointer ref_logits, int64_t ref_stride, int64_t V, Pointer ids,
                 double inv_temperature, double softcap) {
    return {logits.as<const In>(),   ref_logits.as<const In>(), stride, ref_stride, V,
            ids.as<const int64_t>(), inv_temperature,           softcap};
}

}  // namespace

int64_t token_kl(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride, Pointer ids,
                 int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs, Pointer entropy,
                 Pointer kl, Pointer ref_logprobs, Pointer stats, int threads) {
    const int64_t bad = first_bad_id(ids.as<const int64_t>(), N, V);
    if (bad >= 0) return bad;
    with_storage(dtype, [&](auto storage) {
        const auto rows = rows_of<decltype(storage)>(logits, row_stride, ref_logits, ref_row_stride, V, ids,
                                                     inv_temperature, softcap);
        forward(rows, N, logprobs, entropy, kl, ref_logprobs, stats, threads);
    });
    return -1;
}

void token_kl_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride,
                       Pointer ids, int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs,
                       Pointer entropy, Pointer stats, Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_kl,
                       Pointer grad_logits, int grad_dtype, int64_t grad_row_stride, int threads) {
    with_gradient(dtype, grad_dtype, [&](auto storage, auto gradient) {
        using In = decltype(storage);
        using Out = decltype(gradient);
        const auto rows = rows_of<In>(logits, row_stride, ref_logits, ref_row_stride, V, ids, inv_temperature, softcap);
        backward(rows, N, logprobs, entropy, stats, grad_logprobs, grad_entropy, grad_kl, grad_logits.as<Out>(),
                 grad_row_stride, threads);
    });
}

}  // namespace rlhf::ISA
