// Recurrences over time: GAE, discounted returns, ReMax returns. A block takes a row, from the row's end. Each thread
// composes a few steps into one map; a scan over the block composes the threads' maps; each thread then walks its steps
// from the state before them. The state is in double. A masked step is the identity, and its output is 0.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

constexpr int kSteps = 4;  // consecutive steps of a thread

// Recurrence has
//   State start(b)              the state behind the last step of row b
//   Token load(i)               reads the numbers of step i
//   Map map(token)              the map of a True step
//   step(State&, token)         applies a True step to the state
//   write(i, on, token, state)  writes the outputs of step i
template <typename Recurrence>
__global__ void __launch_bounds__(kThreads) scan_rows(Recurrence recurrence, const uint8_t* mask, int64_t L) {
    using Map = typename Recurrence::Map;
    alignas(16) __shared__ char memory[2][kThreads / 32 * sizeof(Map)];
    const int64_t begin = blockIdx.x * L;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    auto state = recurrence.start(blockIdx.x);
    int half = 0;  // of the shared memory, by turns: another thread may still read the half of the stretch before
    for (int64_t end = L; end > 0; end -= int64_t(blockDim.x) * kSteps, half ^= 1) {
        const int64_t last = end - 1 - int64_t(threadIdx.x) * kSteps;  // thread 0 has the last steps
        typename Recurrence::Token tokens[kSteps];
        bool on[kSteps];
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            const int64_t t = last - k;
            on[k] = t >= 0 && mask[begin + t];
            if (t >= 0) tokens[k] = recurrence.load(begin + t);
        }
        Map mine;
#pragma unroll
        for (int k = 0; k < kSteps; ++k)
            if (on[k]) mine.then(recurrence.map(tokens[k]));
#pragma unroll
        for (int width = 1; width < 32; width *= 2) {  // `mine` takes all steps of the lanes up to this one
            Map later = shuffle(mine, [=](unsigned word) { return __shfl_up_sync(kAll, word, width); });
            if (lane < width) continue;
            later.then(mine);
            mine = later;
        }
        Map* totals = reinterpret_cast<Map*>(memory[half]);
        if (lane == 31) totals[warp] = mine;
        Map before = shuffle(mine, [](unsigned word) { return __shfl_up_sync(kAll, word, 1); });
        if (lane == 0) before = Map();
        __syncthreads();
        auto here = state;
        for (int w = 0; w < warps; ++w) {
            if (w == warp) here = before(state);
            state = totals[w](state);
        }
#pragma unroll
        for (int k = 0; k < kSteps; ++k) {
            if (on[k]) recurrence.step(here, tokens[k]);
            if (last - k >= 0) recurrence.write(begin + last - k, on[k], tokens[k], here);
        }
    }
}

template <typename Recurrence>
void launch_scan(const char* what, const Recurrence& recurrence, Pointer mask, int64_t B, int64_t L, Pointer stream) {
    const int64_t warps = clamp(blocks_for(L, 32 * kSteps), int64_t(1), int64_t(kThreads / 32));
    launch(what, stream, scan_rows<Recurrence>, B, int(32 * warps), recurrence, mask.as<const uint8_t>(), L);
}

template <typename T>
struct GAERows {
    const T *rewards, *values, *lams;
    double gamma, lam;
    T *advantages, *returns;

    using Map = GAEMap;
    struct Token {
        T reward, value;
    };
    __device__ double of_row() const { return lams ? double(lams[blockIdx.x]) : lam; }
    __device__ GAEState start(int64_t) const { return {}; }
    __device__ Token load(int64_t i) const { return {rewards[i], values[i]}; }
    __device__ Map map(const Token& token) const {
        return GAEMap::of_step(double(token.reward), double(token.value), gamma, of_row());
    }
    __device__ void step(GAEState& state, const Token& token) const {
        state.step(double(token.reward), double(token.value), gamma, of_row());
    }
    __device__ void write(int64_t i, bool on, const Token& token, const GAEState& state) const {
        advantages[i] = on ? T(state.advantage) : T(0);
        returns[i] = on ? T(state.advantage + double(token.value)) : T(0);
    }
};

template <typename T>
struct DiscountedRows {
    const T* rewards;
    double gamma;
    T* out;

    using Map = Affine;
    using Token = T;
    __device__ double start(int64_t) const { return 0; }
    __device__ Token load(int64_t i) const { return rewards[i]; }
    __device__ Map map(Token reward) const { return {gamma, double(reward)}; }
    __device__ void step(double& state, Token reward) const { state = map(reward)(state); }
    __device__ void write(int64_t i, bool on, Token, double state) const { out[i] = on ? T(state) : T(0); }
};

// The state is the discounted advantage for kOfficial, and the KL to go for kVerl.
template <typename T>
struct RemaxRows {
    const T *scores, *greedy, *logp, *ref;
    double kl_coef, gamma, clip;
    int variant;
    T* out;

    using Map = Affine;
    using Token = double;  // the token's KL
    __device__ double advantage(int64_t b) const { return clamp(double(scores[b]) - double(greedy[b]), -clip, clip); }
    __device__ double start(int64_t b) const { return variant == kOfficial ? advantage(b) : 0; }
    __device__ Token load(int64_t i) const { return double(logp[i]) - double(ref[i]); }
    __device__ Map map(Token kl) const {
        return {variant == kOfficial ? gamma : 1.0, variant == kVerl ? kl : 0.0};  // gamma at the last token
    }
    __device__ void step(double& state, Token kl) const { state = map(kl)(state); }
    __device__ void write(int64_t i, bool on, Token kl, double state) const {
        const double whole = variant == kOfficial ? state : advantage(blockIdx.x);
        out[i] = on ? T(whole - kl_coef * (variant == kVerl ? state : kl)) : T(0);
    }
};

template <typename T>
void launch_gae(Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t L, double gamma,
                double lam, Pointer advantages, Pointer returns, Pointer stream) {
    const GAERows<T> rows = {rewards.as<const T>(), values.as<const T>(), lams.as<const T>(), gamma, lam,
                             advantages.as<T>(),    returns.as<T>()};
    launch_scan("gae", rows, mask, B, L, stream);
}

template <typename T>
void launch_discounted(Pointer rewards, Pointer mask, int64_t B, int64_t L, double gamma, Pointer out, Pointer stream) {
    launch_scan("discounted_returns", DiscountedRows<T>{rewards.as<const T>(), gamma, out.as<T>()}, mask, B, L, stream);
}

template <typename T>
void launch_remax(Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t L,
                  double kl_coef, double gamma, double clip, int variant, Pointer out, Pointer stream) {
    const RemaxRows<T> rows = {scores.as<const T>(),
                               greedy.as<const T>(),
                               logp.as<const T>(),
                               ref.as<const T>(),
                               kl_coef,
                               gamma,
                               clip,
                               variant,
                               out.as<T>()};
    launch_scan("remax_returns", rows, mask, B, L, stream);
}

}  // namespace

void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t T, double gamma,
         double lam, Pointer advantages, Pointer returns, Pointer stream) {
    RLHF_BY_DTYPE(launch_gae, rewards, values, mask, lams, B, T, gamma, lam, advantages, returns, stream);
}

void discounted_returns(int dtype, Pointer rewards, Pointer mask, int64_t B, int64_t T, double gamma, Pointer out,
                        Pointer stream) {
    RLHF_BY_DTYPE(launch_discounted, rewards, mask, B, T, gamma, out, stream);
}

void remax_returns(int dtype, Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B,
                   int64_t T, double kl_coef, double gamma, double clip, int variant, Pointer out, Pointer stream) {
    RLHF_BY_DTYPE(launch_remax, scores, greedy, logp, ref, mask, B, T, kl_coef, gamma, clip, variant, out, stream);
}

}  // namespace rlhf::cuda
