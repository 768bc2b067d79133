// log p(token) and entropy of softmax(logits / temperature). Forward, a block takes a row and reads the logits once, 16
// bytes at a time. With fewer rows than the device has room for, several blocks share a row, and the last block to
// finish merges their states. Backward, a block takes a stretch of a row; the gradient may replace the logits.
#include "softmax_sums.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kInFlight = 4;            // lines of 16 bytes that a thread loads before it uses them
constexpr int64_t kFewestLines = 512;   // lines of a block that shares a row, at least
constexpr int kBlocksPerProcessor = 4;  // at 64 registers a thread; half for double, whose values take two registers
template <typename In>
constexpr int kResident = sizeof(In) == 8 ? kBlocksPerProcessor / 2 : kBlocksPerProcessor;

// The sums of this thread's share of part `part` of `splits` parts of a row, without the target.
template <typename In>
__device__ OnlineSums<Compute<In>> accumulate(const In* row, int64_t V, int64_t target, int part, int splits,
                                              Compute<In> factor, Compute<In> softcap) {
    using T = Compute<In>;
    constexpr int kCount = kInFlight * kWidth<In>;
    const Lines<In> at(row, V);
    const int64_t share = (at.lines + splits - 1) / splits, begin = minimum(part * share, at.lines),
                  end = minimum(begin + share, at.lines);
    OnlineSums<T> sums;
    const auto single = [&](int64_t j, int64_t end_of_singles) {
        if (j >= end_of_singles || j == target) return;
        const T z[1] = {capped(T(widen(row[j])), softcap)};
        sums.add(z, factor);
    };
    if (part == 0) single(threadIdx.x, at.head);
    if (part == splits - 1) single(at.tail + threadIdx.x, V);
    for (int64_t line = begin + threadIdx.x; line < end; line += kInFlight * kThreads) {
        T z[kCount];
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            const int64_t mine = line + k * kThreads;
            T* here = z + k * kWidth<In>;
            if (mine < end) {
                load_16_bytes(row + at.head + mine * kWidth<In>, here);
            } else {
#pragma unroll
                for (int j = 0; j < kWidth<In>; ++j) here[j] = T(-kInf);
            }
        }
#pragma unroll
        for (int k = 0; k < kInFlight; ++k) {
            T* here = z + k * kWidth<In>;
            if (softcap != 0 && line + k * kThreads < end) {
#pragma unroll
                for (int j = 0; j < kWidth<In>; ++j) here[j] = capped(here[j], softcap);
            }
            const int64_t from_here = target - at.head - (line + k * kThreads) * kWidth<In>;
            if (from_here >= 0 && from_here < kWidth<In>) {
#pragma unroll
                for (int j = 0; j < kWidth<In>; ++j) here[j] = j == from_here ? T(-kInf) : here[j];
            }
        }
        sums.add(z, factor);
    }
    return sums;
}

template <typename In>
__global__ void __launch_bounds__(kThreads, kResident<In>)
    forward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t V, double inv_temperature, double softcap,
            int splits, Compute<In>* logprobs, Compute<In>* entropy, Compute<In>* stats, Scratch* scratch) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x / splits, target = ids[i];
    const int part = int(blockIdx.x - i * splits);
    const In* row = logits + i * row_stride;
    const T factor = T(inv_temperature * kLog2E);
    RowOutputs out = {0, 0, 0, 0};
    if (target != kMasked) {
        Softmax others =
            merge_threads(accumulate(row, V, target, part, splits, factor, T(softcap)), factor, inv_temperature);
        if (splits > 1) {
            Softmax* states = reinterpret_cast<Softmax*>(scratch->partials) + i * splits;
            if (threadIdx.x == 0) states[part] = others;
            if (!last_to_arrive(&scratch->arrived[i], unsigned(splits))) return;
            others = merge_states(int(threadIdx.x) < splits ? states[threadIdx.x] : Softmax(), inv_temperature);
        }
        if (threadIdx.x == 0) {
            const bool in_range = target >= 0 && target < V;
            const double z_t = in_range ? double(capped(T(widen(row[target])), T(softcap))) : kInf - kInf;
            out = row_outputs(others, z_t, inv_temperature);
        }
    }
    if (threadIdx.x != 0) return;
    logprobs[i] = T(out.logprob);
    entropy[i] = T(out.entropy);
    stats[2 * i] = T(out.shift);
    stats[2 * i + 1] = T(out.log_sum);
}

// dz_j = gL (1[j = t] - p_j) - gH p_j (log p_j + H), then the chain rule through the temperature and the softcap.
template <typename T>
struct RowGradient {
    T factor, lowest, shift, slope, offset, softcap;

    RLHF_INLINE T through_softcap(T z, T dz) const {
        return softcap == 0 ? dz : dz * (1 - (z / softcap) * (z / softcap));
    }
    RLHF_INLINE T operator()(T logit) const {
        const T z = capped(logit, softcap), d = z - shift, clamped = d < lowest ? lowest : d;
        return through_softcap(z, exp2_scaled(clamped, factor) * (slope * clamped + offset));
    }
};

constexpr int64_t kStretch = kInFlight * kThreads;  // lines of a block's stretch

// grad_logits may be the same memory as logits, because every thread writes only elements that no other thread reads.
template <typename In>
__global__ void __launch_bounds__(kThreads, kResident<In>)
    backward(const In* logits, int64_t row_stride, const int64_t* ids, int64_t V, double inv_temperature,
             double softcap, int stretches, const Compute<In>* logprobs, const Compute<In>* entropy,
             const Compute<In>* stats, const Compute<In>* grad_logprobs, const Compute<In>* grad_entropy,
             In* grad_logits, int64_t grad_row_stride) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x / stretches, stretch = blockIdx.x - i * stretches, target = ids[i];
    const In* row = logits + i * row_stride;
    In* out = grad_logits + i * grad_row_stride;
    const bool on = target != kMasked;
    const double g_logprob = grad_logprobs ? double(grad_logprobs[i]) : 0,
                 g_entropy = grad_entropy ? double(grad_entropy[i]) : 0, log_sum = double(stats[2 * i + 1]),
                 scale = -inv_temperature * std::exp(-log_sum);
    RowGradient<T> gradient;
    gradient.factor = T(inv_temperature * kLog2E);
    gradient.lowest = kLowest<T> / gradient.factor;
    gradient.shift = stats[2 * i];
    gradient.slope = T(scale * g_entropy * inv_temperature);
    gradient.offset = T(scale * (g_logprob + g_entropy * (double(entropy[i]) - log_sum)));
    gradient.softcap = T(softcap);
    const auto at_target = [&](T logit) {
        return gradient.through_softcap(
            capped(logit, gradient.softcap),
            T(target_gradient(double(logprobs[i]), double(entropy[i]), g_logprob, g_entropy) * inv_temperature));
    };
    const auto single = [&](int64_t j) {
        const T logit = widen(row[j]);
        narrow(!on ? T(0) : j == target ? at_target(logit) : gradient(logit), out[j]);
    };
    const bool aligned_alike = (uintptr_t(row) - uintptr_t(out)) % 16 == 0;
    const Lines<In> at(row, V);
    const int64_t begin = stretch * kStretch, end = minimum(begin + kStretch, at.lines);
    if (stretch == 0 && threadIdx.x < at.head) single(threadIdx.x);
    if (stretch == stretches - 1 && at.tail + threadIdx.x < V) single(at.tail + threadIdx.x);
    if (!aligned_alike) {
        for (int64_t j = at.head + begin * kWidth<In> + threadIdx.x; j < at.head + end * kWidth<In>; j += kThreads)
            single(j);
        return;
    }
    T z[kInFlight][kWidth<In>];
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        const int64_t line = begin + k * kThreads + threadIdx.x;
        if (on && line < end) load_16_bytes(row + at.head + line * kWidth<In>, z[k]);
    }
#pragma unroll
    for (int k = 0; k < kInFlight; ++k) {
        const int64_t first = at.head + (begin + k * kThreads + threadIdx.x) * kWidth<In>, from_here = target - first;
        if (first >= at.head + end * kWidth<In>) continue;
        const bool has_target = from_here >= 0 && from_here < kWidth<In>;
        T target_logit = 0;
        if (has_target) target_logit = widen(row[target]);  // read before out may overwrite it
#pragma unroll
        for (int j = 0; j < kWidth<In>; ++j) z[k][j] = on ? gradient(z[k][j]) : T(0);
        store_16_bytes(z[k], out + first);
        if (has_target) narrow(at_target(target_logit), out[target]);
    }
}

int multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "token_logprobs");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "token_logprobs");
    return count;
}

// Blocks per row: enough for two waves of blocks on the device, but some kFewestLines lines or more for each block.
int splits_of(int64_t N, int64_t lines) {
    const int64_t wanted = blocks_for(int64_t(2) * kBlocksPerProcessor * multiprocessors(), N),
                  most = minimum(blocks_for(lines, kFewestLines), int64_t(kThreads));
    return N > kMaxBlocks ? 1 : int(clamp(minimum(wanted, kMaxBlocks / N), int64_t(1), maximum(most, int64_t(1))));
}

template <typename In>
void launch_forward(Pointer logits, int64_t row_stride, Pointer ids, int64_t N, int64_t V, double inv_temperature,
                    double softcap, Pointer logprobs, Pointer entropy, Pointer stats, Pointer scratch, Pointer stream) {
    using T = Compute<In>;
    const int splits = splits_of(N, V / kWidth<In>);
    launch("token_logprobs", stream, forward<In>, N * splits, kThreads, logits.as<const In>(), row_stride,
           ids.as<const int64_t>(), V, inv_temperature, softcap, splits, logprobs.as<T>(), entropy.as<T>(),
           stats.as<T>(), scratch.as<Scratch>());
}

template <typename In>
void launch_backward(Pointer logits, int64_t row_stride, Pointer ids, int64_t N, int64_t V, double inv_temperature,
                     double softcap, Pointer logprobs, Pointer entropy, Pointer stats, Pointer grad_logprobs,
                     Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride, Pointer stream) {
    using T = Compute<In>;
    const int64_t stretches = maximum(blocks_for(V / kWidth<In>, kStretch), int64_t(1));
    launch("token_logprobs_backward", stream, backward<In>, N * stretches, kThreads, logits.as<const In>(), row_stride,
           ids.as<const int64_t>(), V, inv_temperature, softcap, int(stretches), logprobs.as<const T>(),
           entropy.as<const T>(), stats.as<const T>(), grad_logprobs.as<const T>(), grad_entropy.as<const T>(),
           grad_logits.as<In>(), grad_row_stride);
}

}  // namespace

void token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                    double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                    Pointer scratch, Pointer stream) {
    if (N == 0) return;
    with_logits(dtype, [&](auto storage) {
        launch_forward<decltype(storage)>(logits, row_stride, ids, N, V, inv_temperature, softcap, logprobs, entropy,
                                          stats, scratch, stream);
    });
}

void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride,
                             Pointer stream) {
    with_logits(dtype, [&](auto storage) {
        launch_backward<decltype(storage)>(logits, row_stride, ids, N, V, inv_temperature, softcap, logprobs, entropy,
                                           stats, grad_logprobs, grad_entropy, grad_logits, grad_row_stride, stream);
    });
}

}  // namespace rlhf::cuda
