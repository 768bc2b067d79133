// One token per row, by inverse CDF over the full softmax or the first argmax, with its log-prob and the row's entropy.
// The log-prob has the bits of token_logprobs for the same row. The caller applies top-k and top-p as logits of -inf.
#include <vector>

#include "ops.h"
#include "row.h"

namespace rlhf::ISA {
namespace {

template <typename In>
Compute<In> row_max(const In* row, int64_t V) {
    alignas(64) Compute<In> buffer[kBlock];
    double top = -kInf;
    for (int64_t i = 0; i < V; i += kBlock) {
        const int64_t n = minimum(kBlock, V - i);
        top = maximum(double(max_of(block(row + i, n, 0.0, buffer), n)), top);
    }
    return Compute<In>(top);
}

// Writes weights = e^((z - m) / temperature) of one block; returns the weights' sum.
template <typename In>
double weigh(const In* from, int64_t n, Compute<In> m, Compute<In> factor, Compute<In>* weights) {
    const Compute<In>* z = block(from, n, 0.0, weights);
    const Compute<In> lowest = kLowest<Compute<In>> / factor;
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = 0; k < n; ++k) {
        Compute<In> d = z[k] - m;
        d = lowest > d ? lowest : d;
        weights[k] = exp2_scaled(d, factor);
        sum += double(weights[k]);
    }
    return sum;
}

// The first column whose running sum of weights exceeds uniform * total. The sums of blocks find the column's block. If
// rounding leaves the goal unmet, the result is the last column with any weight.
template <typename In>
int64_t inverse_cdf(const In* row, int64_t V, Compute<In> m, double inv_temperature, double uniform,
                    double* block_sums) {
    using T = Compute<In>;
    alignas(64) T weights[kBlock];
    double total = 0;
    for (int64_t i = 0, b = 0; i < V; i += kBlock, ++b)
        total += block_sums[b] = weigh(row + i, minimum(kBlock, V - i), m, T(inv_temperature * kLog2E), weights);
    const double goal = uniform * total;
    double before = 0, running = 0;
    int64_t chosen_block = 0;
    for (int64_t b = 0; b * kBlock < V && running <= goal; ++b) {
        if (block_sums[b] > 0) {
            chosen_block = b;
            before = running;
        }
        running += block_sums[b];
    }
    const int64_t begin = chosen_block * kBlock, n = minimum(kBlock, V - begin);
    weigh(row + begin, n, m, T(inv_temperature * kLog2E), weights);
    int64_t token = begin;
    for (int64_t k = 0; k < n && before <= goal; ++k) {
        if (weights[k] > 0) token = begin + k;
        before += double(weights[k]);
    }
    return token;
}

template <typename In>
int64_t first_equal(const In* row, int64_t V, Compute<In> value) {
    for (int64_t j = 0; j < V; ++j)
        if (widen(row[j]) == value) return j;
    return 0;
}

template <typename In>
int64_t sample(const In* logits, int64_t row_stride, int64_t N, int64_t V, double inv_temperature,
               const double* uniforms, const uint8_t* greedy, int64_t* tokens, Compute<In>* logprobs,
               Compute<In>* entropy, int threads) {
    int64_t bad = N;
    const int team = team_size(N * V, threads);
#pragma omp parallel num_threads(team) reduction(min : bad)
    {
        std::vector<double> block_sums((V + kBlock - 1) / kBlock);
#pragma omp for schedule(static)
        for (int64_t i = 0; i < N; ++i) {
            const In* row = logits + i * row_stride;
            const Compute<In> m = row_max(row, V);
            tokens[i] = greedy && greedy[i] ? first_equal(row, V, m)
                                            : inverse_cdf(row, V, m, inv_temperature, uniforms[i], block_sums.data());
            const RowOutputs result = row_outputs_of(row, V, tokens[i], inv_temperature, 0.0);
            logprobs[i] = Compute<In>(result.logprob);
            entropy[i] = Compute<In>(result.entropy);
            const bool valid = result.entropy == result.entropy && result.logprob > -kInf;
            if (!valid && i < bad) bad = i;
        }
    }
    return bad == N ? -1 : bad;
}

}  // namespace

int64_t sample_tokens(Pointer logits, int dtype, int64_t row_stride, int64_t N, int64_t V, double inv_temperature,
                      Pointer uniforms, Pointer greedy, Pointer tokens, Pointer logprobs, Pointer entropy,
                      int threads) {
    return with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        using T = Compute<In>;
        return sample(logits.as<const In>(), row_stride, N, V, inv_temperature, uniforms.as<const double>(),
                      greedy.as<const uint8_t>(), tokens.as<int64_t>(), logprobs.as<T>(), entropy.as<T>(), threads);
    });
}

}  // namespace rlhf::ISA
