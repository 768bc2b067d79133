// log p(token), the entropy of p and KL(p || q), with p = softmax(logits / temperature) and q = softmax(ref_logits /
// temperature). Forward, a block takes a row and reads both rows once, 16 bytes at a time where they are aligned.
// Backward, a block takes a stretch of a row; the gradient may replace the logits. No row is split over blocks.
#include "softmax_sums.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kInFlight = 2;  // lines of 16 bytes of each row that a thread loads before it uses them

RLHF_INLINE float near_excess(float u) {
    float excess;
    near_bregman(u, excess);
    return excess;
}
RLHF_INLINE double near_excess(double u) { return bregman(u); }

// A thread's sums of a SoftmaxPair.
template <typename T>
struct PairSums {
    T top = T(-kInf), ref_top = T(-kInf), sum = 0, centred = 0, cross = 0, excess = 0, ref_sum = 0, far = 0;
    bool unsupported = false;

    RLHF_INLINE void move(T to, T ref_to, T factor) {
        const T lowest = kLowest<T> / factor;
        if (sum != 0) {  // the top of an empty sum may be -inf
            const T d = maximum(top - to, lowest), e = exp2_scaled(d, factor);
            centred = e * (centred + sum * d);
            sum *= e;
            cross = e == 0 ? T(0) : cross * e;
            excess = e == 0 ? T(0) : excess * e;
        }
        if (ref_sum != 0) {
            const T e = exp2_scaled(maximum(ref_top - ref_to, lowest), factor);
            ref_sum *= e;
            far *= e;
        }
        top = to;
        ref_top = ref_to;
    }
    template <int kCount>
    RLHF_INLINE void add(const T (&z)[kCount], const T (&z_ref)[kCount], T centre, T factor, T inv_temperature) {
        T highest = top, ref_highest = ref_top;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            highest = z[k] > highest ? z[k] : highest;
            ref_highest = z_ref[k] > ref_highest ? z_ref[k] : ref_highest;
        }
        if (highest > top || ref_highest > ref_top) move(highest, ref_highest, factor);
        const T shift = top > T(-kInf) ? top : T(0), ref_shift = ref_top > T(-kInf) ? ref_top : T(0),
                lowest = kLowest<T> / factor;
        T new_sum = 0, new_centred = 0, new_cross = 0, new_excess = 0, new_ref_sum = 0, new_far = 0;
#pragma unroll
        for (int k = 0; k < kCount; ++k) {
            T d = z[k] - shift, d_ref = z_ref[k] - ref_shift, u;
            difference(z[k], z_ref[k], centre, u);
            unsupported |= z_ref[k] == T(-kInf) && z[k] > T(-kInf);
            d = d < lowest ? lowest : d;
            d_ref = d_ref < lowest ? lowest : d_ref;
            u = bounded(u * inv_temperature);
            const T w = exp2_scaled(d, factor), w_ref = exp2_scaled(d_ref, factor);
            new_sum += w;
            new_centred += w * d;
            new_cross += w * u;
            new_excess += w * (is_near(u) ? near_excess(u) : -1 - u);
            new_ref_sum += w_ref;
            new_far += is_near(u) ? T(0) : w_ref;
        }
        sum += new_sum;
        centred += new_centred;
        cross += new_cross;
        excess += new_excess;
        ref_sum += new_ref_sum;
        far += new_far;
    }
};

struct PairTotals {
    double sum, centred, cross, excess, ref_sum, far, unsupported;
    __device__ void operator+=(const PairTotals& other) {
        sum += other.sum;
        centred += other.centred;
        cross += other.cross;
        excess += other.excess;
        ref_sum += other.ref_sum;
        far += other.far;
        unsupported += other.unsupported;
    }
};

template <typename T>
__device__ SoftmaxPair merge_pairs(PairSums<T> mine, T factor, double inv_temperature) {
    const T top = block_reduce(mine.top, Largest()), ref_top = block_reduce(mine.ref_top, Largest());
    mine.move(top, ref_top, factor);
    const PairTotals all =
        block_reduce(PairTotals{double(mine.sum), double(mine.centred), double(mine.cross), double(mine.excess),
                                double(mine.ref_sum), double(mine.far), mine.unsupported ? 1.0 : 0.0},
                     Add());
    SoftmaxPair pair;
    pair.policy = {double(top), all.sum, all.centred * inv_temperature};
    pair.reference = {double(ref_top), all.ref_sum, 0};
    pair.cross = all.cross;
    pair.excess = all.excess;
    pair.far = all.far;
    pair.unsupported = all.unsupported > 0;
    return pair;
}

// Two tensors of the same shape [N, V] and dtype, each with its own row stride, and the token ids of the rows.
template <typename In>
struct Rows {
    const In *logits, *ref_logits;
    int64_t stride, ref_stride, V;
    const int64_t* ids;
    double inv_temperature, softcap;
};

template <typename T>
struct Candidate {
    T z = T(-kInf);
    double centre = 0;
};
struct Likelier {
    template <typename T>
    __device__ void operator()(Candidate<T>& a, const Candidate<T>& b) const {
        if (b.z > a.z) a = b;
    }
};

// z_ref - z of the likeliest token among the target and the row's first columns, where the difference is finite. The
// centre is near the mean of z_ref - z under p, so that float32 keeps the digits of a small KL whatever the rows'
// offset.
template <typename In>
__device__ double centre_of(const In* row, const In* ref_row, int64_t V, int64_t target, Compute<In> softcap) {
    using T = Compute<In>;
    Candidate<T> mine;
    const auto consider = [&](T z, T z_ref) {
        const double difference = double(z_ref - z);
        if (difference > -kInf && difference < kInf) Likelier()(mine, {z, difference});
    };
    T z[kWidth<In>], z_ref[kWidth<In>];
    load_columns(row, int64_t(threadIdx.x) * kWidth<In>, V, softcap, z);
    load_columns(ref_row, int64_t(threadIdx.x) * kWidth<In>, V, softcap, z_ref);
    for (int k = 0; k < kWidth<In>; ++k) consider(z[k], z_ref[k]);
    if (threadIdx.x == 0 && target >= 0 && target < V)
        consider(capped(T(widen(row[target])), softcap), capped(T(widen(ref_row[target])), softcap));
    return block_reduce(mine, Likelier()).centre;
}

template <typename In>
__global__ void __launch_bounds__(kThreads) forward(Rows<In> rows, Compute<In>* logprobs, Compute<In>* entropy,
                                                    Compute<In>* kl, Compute<In>* ref_logprobs, Compute<In>* stats) {
    using T = Compute<In>;
    constexpr int kCount = kInFlight * kWidth<In>;
    const int64_t i = blockIdx.x, V = rows.V, target = rows.ids[i];
    const T softcap = T(rows.softcap), factor = T(rows.inv_temperature * kLog2E);
    const auto write = [&](const PairOutputs& out) {
        logprobs[i] = T(out.logprob);
        entropy[i] = T(out.entropy);
        kl[i] = T(out.kl);
        ref_logprobs[i] = T(out.ref_logprob);
        stats[4 * i] = T(out.shift);
        stats[4 * i + 1] = T(out.log_sum);
        stats[4 * i + 2] = T(out.centre);
        stats[4 * i + 3] = T(out.mean);
    };
    if (target == kMasked) {
        if (threadIdx.x == 0) write({});
    } else {
        const In *row = rows.logits + i * rows.stride, *ref_row = rows.ref_logits + i * rows.ref_stride;
        const bool in_range = target >= 0 && target < V;
        const auto logit = [&](const In* from) {
            return in_range ? double(capped(T(widen(from[target])), softcap)) : kInf - kInf;
        };
        double centre = centre_of(row, ref_row, V, target, softcap);
        for (int again = kRecentred;; --again) {
            PairSums<T> sums;
            for (int64_t begin = 0; begin < V; begin += kThreads * kCount) {
                T z[kCount], z_ref[kCount];
#pragma unroll
                for (int k = 0; k < kInFlight; ++k) {
                    const int64_t column = begin + (k * kThreads + threadIdx.x) * kWidth<In>;
                    load_columns(row, column, V, softcap, z + k * kWidth<In>);
                    load_columns(ref_row, column, V, softcap, z_ref + k * kWidth<In>);
#pragma unroll
                    for (int j = 0; j < kWidth<In>; ++j)
                        if (column + j == target) z[k * kWidth<In> + j] = z_ref[k * kWidth<In> + j] = T(-kInf);
                }
                sums.add(z, z_ref, T(centre), factor, T(rows.inv_temperature));
            }
            const SoftmaxPair others = merge_pairs(sums, factor, rows.inv_temperature);
            __shared__ double moved;  // infinite: the sums are good
            if (threadIdx.x == 0) {
                const PairOutputs out =
                    pair_outputs<T>(others, logit(row), logit(ref_row), centre, rows.inv_temperature);
                write(out);
                moved = out.off_centre && again > 0 ? out.centre : kInf;
            }
            __syncthreads();
            centre = moved;
            if (centre == kInf) break;
        }
    }
}

// grad_logits may be the same memory as logits, because every thread writes only elements that no other thread reads.
template <typename In>
__global__ void __launch_bounds__(kThreads)
    backward(Rows<In> rows, int stretches, const Compute<In>* logprobs, const Compute<In>* entropy,
             const Compute<In>* stats, const Compute<In>* grad_logprobs, const Compute<In>* grad_entropy,
             const Compute<In>* grad_kl, In* grad_logits, int64_t grad_row_stride) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x / stretches, stretch = blockIdx.x - i * stretches, V = rows.V, target = rows.ids[i];
    const In *row = rows.logits + i * rows.stride, *ref_row = rows.ref_logits + i * rows.ref_stride;
    In* out = grad_logits + i * grad_row_stride;
    const bool on = target != kMasked;
    const T softcap = T(rows.softcap);
    const auto upstream = [&](const T* grad) { return grad ? double(grad[i]) : 0.0; };
    const PairUpstream by = {upstream(grad_logprobs), upstream(grad_entropy), upstream(grad_kl)};
    const PairGradient<T> gradient(stats + 4 * i, double(entropy[i]), by, rows.inv_temperature);
    T z[kInFlight][kWidth<In>], z_ref[kInFlight][kWidth<In>];
    const int64_t first = (stretch * kInFlight * kThreads + threadIdx.x) * kWidth<In>;
    constexpr int64_t kStep = kThreads * kWidth<In>;
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        if (!on || first + k * kStep >= V) continue;
        load_columns(row, first + k * kStep, V, softcap, z[k]);
        load_columns(ref_row, first + k * kStep, V, softcap, z_ref[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        const int64_t column = first + k * kStep;
        if (column >= V) continue;
#pragma unroll
        for (int j = 0; j < kWidth<In>; ++j) {
            const T dz = column + j == target ? gradient.at_target(z[k][j], z_ref[k][j], double(logprobs[i]),
                                                                   double(entropy[i]), by, rows.inv_temperature)
                                              : gradient.at(z[k][j], z_ref[k][j]);
            z[k][j] = on ? through_softcap(z[k][j], dz, softcap) : T(0);
        }
        if (column + kWidth<In> <= V && uintptr_t(out + column) % 16 == 0) {
            store_16_bytes(z[k], out + column);
        } else {
#pragma unroll
            for (int j = 0; j < kWidth<In>; ++j)
                if (column + j < V) narrow(z[k][j], out[column + j]);
        }
    }
}

template <typename In>
Rows<In> rows_of(Pointer logits, int64_t stride, Pointer ref_logits, int64_t ref_stride, int64_t V, Pointer ids,
                 double inv_temperature, double softcap) {
    return {logits.as<const In>(),   ref_logits.as<const In>(), stride, ref_stride, V,
            ids.as<const int64_t>(), inv_temperature,           softcap};
}

template <typename In>
void launch_forward(const Rows<In>& rows, int64_t N, Pointer logprobs, Pointer entropy, Pointer kl,
                    Pointer ref_logprobs, Pointer stats, Pointer stream) {
    using T = Compute<In>;
    launch("token_kl", stream, forward<In>, N, kThreads, rows, logprobs.as<T>(), entropy.as<T>(), kl.as<T>(),
           ref_logprobs.as<T>(), stats.as<T>());
}

template <typename In>
void launch_backward(const Rows<In>& rows, int64_t N, Pointer logprobs, Pointer entropy, Pointer stats,
                     Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_kl, Pointer grad_logits,
                     int64_t grad_row_stride, Pointer stream) {
    using T = Compute<In>;
    const int64_t stretches = blocks_for(rows.V, kInFlight * kThreads * kWidth<In>);
    launch("token_kl_backward", stream, backward<In>, N * stretches, kThreads, rows, int(stretches),
           logprobs.as<const T>(), entropy.as<const T>(), stats.as<const T>(), grad_logprobs.as<const T>(),
           grad_entropy.as<const T>(), grad_kl.as<const T>(), grad_logits.as<In>(), grad_row_stride);
}

}  // namespace

#define RLHF_ROWS(In) rows_of<In>(logits, row_stride, ref_logits, ref_row_stride, V, ids, inv_temperature, softcap)

void token_kl(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride, Pointer ids,
              int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs, Pointer entropy,
              Pointer kl, Pointer ref_logprobs, Pointer stats, Pointer stream) {
    with_logits(dtype, [&](auto storage) {
        launch_forward(RLHF_ROWS(decltype(storage)), N, logprobs, entropy, kl, ref_logprobs, stats, stream);
    });
}

void token_kl_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride,
                       Pointer ids, int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs,
                       Pointer entropy, Pointer stats, Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_kl,
                       Pointer grad_logits, int64_t grad_row_stride, Pointer stream) {
    with_logits(dtype, [&](auto storage) {
        launch_backward(RLHF_ROWS(decltype(storage)), N, logprobs, entropy, stats, grad_logprobs, grad_entropy, grad_kl,
                        grad_logits, grad_row_stride, stream);
    });
}

}  // namespace rlhf::cuda
