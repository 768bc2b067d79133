// Normalised advantages: masked whitening, and the group baselines of RLOO and GRPO. Sums run in double, in a fixed
// order.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kPerThread = 4;  // elements that a thread loads before it uses them
constexpr int64_t kTile = kThreads * kPerThread;

// A block computes the moments of its tiles, each about its own mean. The last block merges the blocks' moments.
template <typename T>
__global__ void __launch_bounds__(kThreads) moments_of(const T* x, const uint8_t* mask, int64_t n, Scratch* scratch) {
    Moments moments;
    for (int64_t tile = blockIdx.x * kTile; tile < n; tile += gridDim.x * kTile) {
        double values[kPerThread];
        bool on[kPerThread];
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
            const int64_t i = tile + k * kThreads + threadIdx.x;
            on[k] = i < n && mask[i];
            values[k] = i < n ? double(x[i]) : 0;
        }
        Moments mine;
#pragma unroll
        for (int k = 0; k < kPerThread; ++k) {
            mine.count += on[k] ? 1 : 0;
            mine.mean += on[k] ? values[k] : 0;
        }
        if (mine.count > 0) mine.mean /= mine.count;
#pragma unroll
        for (int k = 0; k < kPerThread; ++k)
            mine.squares += on[k] ? (values[k] - mine.mean) * (values[k] - mine.mean) : 0;
        moments += mine;
    }
    if (grid_reduce(moments, Add(), scratch) && threadIdx.x == 0) {
        scratch->carried[0] = moments.mean;
        scratch->carried[1] = moments.whitening_scale();
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    whiten_by(const Scratch* scratch, const T* x, const uint8_t* mask, int64_t n, bool shift_mean, T* out) {
    const double mean = scratch->carried[0], scale = scratch->carried[1], shift = shift_mean ? 0 : mean;
    const int64_t first = blockIdx.x * kTile + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
        const int64_t i = first + k * kThreads;
        if (i < n) out[i] = mask[i] ? T((double(x[i]) - mean) * scale + shift) : T(0);
    }
}

// A warp takes a group.
template <typename T, bool kLeaveOneOut>
__global__ void __launch_bounds__(kThreads) group_rows(const T* scores, int64_t groups, int64_t group, T* out) {
    const int64_t g = blockIdx.x * int64_t(kThreads / 32) + threadIdx.x / 32;
    if (g >= groups) return;
    const int64_t begin = g * group + threadIdx.x % 32, end = (g + 1) * group;
    double sum = 0;
    for (int64_t i = begin; i < end; i += 32) sum += double(scores[i]);
    sum = warp_sum(sum);
    if (kLeaveOneOut) {
        for (int64_t i = begin; i < end; i += 32) {
            const double score = double(scores[i]);
            out[i] = T(score - (sum - score) / double(group - 1));
        }
        return;
    }
    const double mean = sum / double(group);
    double squares = 0;
    for (int64_t i = begin; i < end; i += 32) squares += (double(scores[i]) - mean) * (double(scores[i]) - mean);
    const double scale = group_scale(warp_sum(squares), group);
    for (int64_t i = begin; i < end; i += 32) out[i] = T((double(scores[i]) - mean) * scale);
}

template <typename T>
void launch_whiten(Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, Pointer scratch_, Pointer stream) {
    if (n == 0) return;
    Scratch* scratch = scratch_.as<Scratch>();
    const int64_t tiles = blocks_for(n, kTile);
    launch("whiten", stream, moments_of<T>, bounded_blocks(tiles), kThreads, x.as<const T>(), mask.as<const uint8_t>(),
           n, scratch);
    launch("whiten", stream, whiten_by<T>, tiles, kThreads, scratch, x.as<const T>(), mask.as<const uint8_t>(), n,
           shift_mean, out.as<T>());
}

template <typename T>
void launch_rloo(Pointer scores, int64_t groups, int64_t group, Pointer out, Pointer stream) {
    launch("rloo_advantages", stream, group_rows<T, true>, blocks_for(groups, kThreads / 32), kThreads,
           scores.as<const T>(), groups, group, out.as<T>());
}

template <typename T>
void launch_grpo(Pointer scores, int64_t groups, int64_t group, Pointer out, Pointer stream) {
    launch("grpo_advantages", stream, group_rows<T, false>, blocks_for(groups, kThreads / 32), kThreads,
           scores.as<const T>(), groups, group, out.as<T>());
}

}  // namespace

void whiten(int dtype, Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, Pointer scratch,
            Pointer stream) {
    RLHF_BY_DTYPE(launch_whiten, x, mask, n, shift_mean, out, scratch, stream);
}

void rloo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, Pointer stream) {
    RLHF_BY_DTYPE(launch_rloo, scores, B / group, group, out, stream);
}

void grpo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, Pointer stream) {
    RLHF_BY_DTYPE(launch_grpo, scores, B / group, group, out, stream);
}

}  // namespace rlhf::cuda
