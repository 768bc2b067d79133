// One token per row by inverse CDF, or the first maximum, with its log-prob and the row's entropy, in two launches. The
// first launch reads the logits once, a block per tile of columns, and keeps each tile's state. In the second launch a
// block takes a row. The block finds the tile into which u falls, reads that tile again, finds the token at which the
// rest of u falls, and merges the other tiles' states with the state of this tile without the token. Tiles are counted
// from column 0, and a thread's columns are the same at whatever address the row starts, so that a row's token does not
// depend on the rows before it. The caller applies top-k and top-p as logits of -inf.
#include "softmax_sums.cuh"

namespace rlhf::cuda {
namespace {

template <typename In>
constexpr int kInFlight = kSampleTile / (kThreads * kWidth<In>);  // lines of 16 bytes per thread

template <typename In>
__global__ void __launch_bounds__(kThreads) tile_states(const In* logits, int64_t row_stride, int64_t V,
                                                        double inv_temperature, int64_t tiles, Softmax* states) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x / tiles, begin = (blockIdx.x - i * tiles) * kSampleTile;
    const T factor = T(inv_temperature * kLog2E);
    T z[kInFlight<In> * kWidth<In>];
#pragma unroll
    for (int k = 0; k < kInFlight<In>; ++k)
        load_columns(logits + i * row_stride, begin + (k * kThreads + threadIdx.x) * kWidth<In>, V, T(0),
                     z + k * kWidth<In>);
    OnlineSums<T> sums;
    sums.add(z, factor);
    const Softmax state = merge_threads(sums, factor, inv_temperature);
    if (threadIdx.x == 0) states[blockIdx.x] = state;
}

// The sum of the values of the threads before this thread, in the threads' order. `total` becomes the sum of all.
__device__ inline double sum_before(double mine, double& total) {
    __shared__ double warps[kThreads / 32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    double through = mine;  // the sum of the warp's lanes up to this lane
    for (int step = 1; step < 32; step *= 2) {
        const double before = __shfl_up_sync(kAll, through, step);
        if (lane >= step) through += before;
    }
    __syncthreads();  // another thread may still read the sums of an earlier call
    if (lane == 31) warps[warp] = through;
    __syncthreads();
    double before = __shfl_up_sync(kAll, through, 1);
    if (lane == 0) before = 0;
    total = 0;
    for (int w = 0; w < kThreads / 32; ++w) {
        if (w == warp) before += total;
        total += warps[w];
    }
    return before;
}

struct Crossing {
    int64_t first, last;
    double rest;
    __device__ void operator+=(const Crossing& other) {
        if (other.first < first) {
            first = other.first;
            rest = other.rest;
        }
        last = maximum(other.last, last);
    }
};
struct Place {
    int64_t index;
    double rest;
};

// The first of n weights at which the running sum exceeds the goal, u times the total, and the part of that weight
// below the goal. If rounding leaves the goal unmet, the result is the last weight that is not 0.
template <typename Weight>
__device__ Place inverse_cdf(int64_t n, double u, Weight weight) {
    const int64_t share = (n + kThreads - 1) / kThreads, begin = minimum(int64_t(threadIdx.x) * share, n),
                  end = minimum(begin + share, n);
    double sum = 0, total;
    for (int64_t k = begin; k < end; ++k) sum += weight(k);
    double running = sum_before(sum, total);
    const double goal = u * total;
    Crossing mine = {n, -1, 1};
    for (int64_t k = begin; k < end; ++k) {
        const double w = weight(k);
        if (w > 0) mine.last = k;
        if (w > 0 && mine.first == n && running + w > goal) {
            mine.first = k;
            mine.rest = (goal - running) / w;
        }
        running += w;
    }
    const Crossing all = block_reduce(mine, Add());
    return all.first < n ? Place{all.first, all.rest} : Place{maximum(all.last, int64_t(0)), 1};
}

template <typename In>
__global__ void __launch_bounds__(kThreads, 2)
    draw(const In* logits, int64_t row_stride, int64_t V, double inv_temperature, int64_t tiles, const Softmax* states,
         const double* uniforms, const uint8_t* greedy, int64_t* tokens, Compute<In>* logprobs, Compute<In>* entropy) {
    using T = Compute<In>;
    const int64_t i = blockIdx.x;
    const In* row = logits + i * row_stride;
    states += i * tiles;
    const T factor = T(inv_temperature * kLog2E), lowest = kLowest<T> / factor;
    const bool first_maximum = greedy && greedy[i];  // found like a draw in which every maximum weighs 1 and u is 0
    const double u = first_maximum ? 0 : uniforms[i];
    double top = -kInf;
    for (int64_t t = threadIdx.x; t < tiles; t += kThreads) top = maximum(states[t].shift, top);
    top = block_reduce(top, Largest());
    const Place tile = inverse_cdf(tiles, u, [&](int64_t t) {
        const Softmax state = states[t];
        if (first_maximum) return state.shift == top ? 1.0 : 0.0;
        return state.sum == 0 ? 0.0 : state.sum * std::exp((state.shift - top) * inv_temperature);
    });
    const int64_t begin = tile.index * kSampleTile, n = minimum(V - begin, int64_t(kSampleTile));
    const T shift = T(states[tile.index].shift);
    const Place place = inverse_cdf(n, tile.rest, [&](int64_t k) {
        const T z = widen(row[begin + k]), d = z - shift;
        if (first_maximum) return z == shift ? 1.0 : 0.0;
        return double(exp2_scaled(d < lowest ? lowest : d, factor));
    });
    const int64_t token = begin + place.index;
    OnlineSums<T> rest;
    for (int64_t k = threadIdx.x; k < n; k += kThreads) {
        const T z[1] = {begin + k == token ? T(-kInf) : T(widen(row[begin + k]))};
        rest.add(z, factor);
    }
    Softmax others;
    for (int64_t t = threadIdx.x; t < tiles; t += kThreads)
        if (t != tile.index) others.merge(states[t], inv_temperature);
    others = merge_states(others, inv_temperature);
    others.merge(merge_threads(rest, factor, inv_temperature), inv_temperature);
    if (threadIdx.x != 0) return;
    const RowOutputs out = row_outputs(others, double(widen(row[token])), inv_temperature);
    tokens[i] = token;
    logprobs[i] = T(out.logprob);
    entropy[i] = T(out.entropy);
}

}  // namespace

void sample_tokens(Pointer logits, int dtype, int64_t row_stride, int64_t N, int64_t V, double inv_temperature,
                   Pointer uniforms, Pointer greedy, Pointer states, Pointer tokens, Pointer logprobs, Pointer entropy,
                   Pointer stream) {
    const int64_t tiles = blocks_for(V, kSampleTile);
    with_logits(dtype, [&](auto storage) {
        using In = decltype(storage);
        using T = Compute<In>;
        launch("sample_tokens", stream, tile_states<In>, N * tiles, kThreads, logits.as<const In>(), row_stride, V,
               inv_temperature, tiles, states.as<Softmax>());
        launch("sample_tokens", stream, draw<In>, N, kThreads, logits.as<const In>(), row_stride, V, inv_temperature,
               tiles, states.as<const Softmax>(), uniforms.as<const double>(), greedy.as<const uint8_t>(),
               tokens.as<int64_t>(), logprobs.as<T>(), entropy.as<T>());
    });
}

}  // namespace rlhf::cuda
