// Generalised advantage estimation: one warp per row, 32 steps at a time from the row's end. Each step is the affine
// map x -> a x + b, composed by a warp scan; masked steps are the identity, which skips them over. State in double.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr unsigned kAll = 0xffffffffu;

template <typename T>
__global__ void gae_rows(const T* rewards, const T* values, const uint8_t* mask, int64_t B, int64_t L, double gamma,
                         double lam, T* advantages, T* returns) {
    const int64_t b = int64_t(blockIdx.x) * (kThreads / 32) + threadIdx.x / 32;
    if (b >= B) return;
    const int lane = threadIdx.x % 32;
    double advantage = 0, next_value = 0;  // of the True step nearest on the right of this chunk
    for (int64_t end = L; end > 0; end -= 32) {
        const int64_t t = end - 32 + lane, i = b * L + t;
        const bool on = t >= 0 && mask[i];
        const double value = on ? double(values[i]) : 0;
        const unsigned right = __ballot_sync(kAll, on) & (lane == 31 ? 0 : kAll << (lane + 1));
        const double neighbour = __shfl_sync(kAll, value, right ? __ffs(int(right)) - 1 : lane);
        double slope = on ? gamma * lam : 1;
        double offset = on ? double(rewards[i]) + gamma * (right ? neighbour : next_value) - value : 0;
        for (int step = 1; step < 32; step *= 2) {
            const double other_slope = __shfl_down_sync(kAll, slope, step),
                         other_offset = __shfl_down_sync(kAll, offset, step);
            if (lane + step >= 32) continue;
            offset += slope * other_offset;
            slope *= other_slope;
        }
        const double mine = slope * advantage + offset;
        if (t >= 0) {
            advantages[i] = on ? T(mine) : T(0);
            returns[i] = on ? T(mine + value) : T(0);
        }
        const unsigned any = __ballot_sync(kAll, on);
        next_value = any ? __shfl_sync(kAll, value, __ffs(int(any)) - 1) : next_value;
        advantage = __shfl_sync(kAll, mine, 0);
    }
}

template <typename T>
void launch(Pointer rewards, Pointer values, Pointer mask, int64_t B, int64_t L, double gamma, double lam,
            Pointer advantages, Pointer returns, Pointer stream) {
    if (B == 0) return;
    const unsigned blocks = unsigned((B + kThreads / 32 - 1) / (kThreads / 32));
    gae_rows<T><<<blocks, kThreads, 0, as_stream(stream)>>>(rewards.as<const T>(), values.as<const T>(),
                                                            mask.as<const uint8_t>(), B, L, gamma, lam,
                                                            advantages.as<T>(), returns.as<T>());
    check(cudaGetLastError(), "gae");
}

}  // namespace

void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, int64_t B, int64_t T, double gamma, double lam,
         Pointer advantages, Pointer returns, Pointer stream) {
    RLHF_BY_DTYPE(launch, rewards, values, mask, B, T, gamma, lam, advantages, returns, stream);
}

}  // namespace rlhf::cuda
