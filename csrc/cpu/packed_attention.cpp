// Causal attention within rows of any length whose tokens stand side by side, and its gradients. A row's keys and
// values are laid out once for all heads that share them. Queries and keys are rotated by their rotary embedding. The
// rest is products of small matrices with their sums in registers. A query has all its scores at the same time, so that
// the softmax needs no second pass over the keys.
#include <algorithm>
#include <vector>

#include "ops.h"
#include "row.h"

namespace rlhf::ISA {
namespace {

constexpr int kRows = 6;        // rows of a tile; the tile's sums, 6 x 2 vectors, leave four AVX2 registers free
constexpr int kBlockRows = 48;  // queries whose scores the backward pass holds, a multiple of kRows
constexpr int kWide = 2 * kLanes;

// n rounded up to a multiple of the vector's length. The compiler sees the multiple and emits no loop for a remainder.
inline int64_t whole(int64_t n, int vector) { return (n + vector - 1) & -int64_t(vector); }

// c [kRows, kVectors vectors] = a [kRows, K] b [K, kVectors vectors]. kAdd: the product is added to c. kTransposed: a
// is stored as [K, kRows].
template <int kVectors, bool kTransposed, bool kAdd, typename T>
inline void tile(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K, T* c, int64_t ldc) {
    using Unaligned = typename VectorOf<T>::unaligned;
    typename VectorOf<T>::type sums[kRows][kVectors] = {}, right[kVectors];
    for (int64_t k = 0; k < K; ++k) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Unaligned*>(b + k * ldb + v * kLanes);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
            const T left = kTransposed ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 2
            for (int v = 0; v < kVectors; ++v) sums[r][v] += left * right[v];
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
            Unaligned* out = reinterpret_cast<Unaligned*>(c + r * ldc + v * kLanes);
            *out = kAdd ? *out + sums[r][v] : sums[r][v];
        }
}

// The product of `tile` for any number of columns, rounded up to whole vectors.
template <bool kTransposed, bool kAdd, typename T>
void product(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t K, int64_t columns, T* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + kLanes < columns; j += kWide) tile<2, kTransposed, kAdd>(a, lda, b + j, ldb, K, c + j, ldc);
    if (j < columns) tile<1, kTransposed, kAdd>(a, lda, b + j, ldb, K, c + j, ldc);
}

// A tensor [heads, tokens, D] whose last dimension is contiguous.
template <typename In>
struct Heads {
    In* first;
    int64_t by_head, by_token;

    In* at(int64_t head, int64_t token) const { return first + head * by_head + token * by_token; }
    Heads from(int64_t head, int64_t token) const { return {at(head, token), by_head, by_token}; }
};

// to [n, width] = n tokens of one head of x, times scale.
template <typename In, typename T>
void load_rows(Heads<const In> x, int64_t n, int64_t D, T scale, T* to, int64_t width) {
    for (const In* from = x.first; n > 0; --n, from += x.by_token, to += width)
#pragma omp simd
        for (int64_t c = 0; c < D; ++c) to[c] = widen(from[c]) * scale;
}

// to [D, width] = n tokens of one head of x, transposed.
template <typename In, typename T>
void load_columns(Heads<const In> x, int64_t n, int64_t D, T* to, int64_t width) {
    const In* from = x.first;
    const int64_t stride = x.by_token;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes, from += kLanes * stride)
        for (int64_t c = 0; c < D; ++c) {
            typename VectorOf<T>::type column;
            for (int k = 0; k < kLanes; ++k) column[k] = widen(from[k * stride + c]);
            *reinterpret_cast<typename VectorOf<T>::unaligned*>(to + c * width + i) = column;
        }
    for (; i < n; ++i, from += stride)
        for (int64_t c = 0; c < D; ++c) to[c * width + i] = widen(from[c]);
}

template <typename In, typename T>
void store_rows(const T* from, int64_t width, int64_t n, int64_t D, Heads<In> x) {
    for (int64_t i = 0; i < n; ++i) store(from + i * width, x.at(0, i), D);
}

// Rotary embedding of tokens: elements i and i + D / 2 are a point that is turned by the token's angle. Null: none.
struct Rotary {
    const float *cosines, *sines;  // [tokens, D]

    Rotary from(int64_t token, int64_t D) const {
        return cosines ? Rotary{cosines + token * D, sines + token * D} : *this;
    }
};

// Turns x [n, width] of n tokens. kBack: multiplies by the rotation's transpose, which turns gradients back.
template <bool kBack, typename T>
void rotate(Rotary rotary, int64_t n, int64_t D, T* x, int64_t width) {
    if (!rotary.cosines) return;
    const int64_t half = D / 2;
    for (; n > 0; --n, x += width, rotary = rotary.from(1, D)) {
        const float *c = rotary.cosines, *s = rotary.sines;
#pragma omp simd
        for (int64_t i = 0; i < half; ++i) {
            const T a = x[i], b = x[i + half];
            x[i] = a * c[i] + (kBack ? b * s[i + half] : -b * s[i]);
            x[i + half] = b * c[i + half] + (kBack ? -a * s[i] : a * s[i + half]);
        }
    }
}

// e^d for d <= 0. NaN stays NaN.
template <typename T>
RLHF_INLINE T weight_of(T d) {
    const T lowest = kLowest<T> / T(kLog2E);
    return exp2_scaled(d < lowest ? lowest : d, T(kLog2E));
}

// Turns the first n of `end` scores into e^(score - top), the others into 0; returns the sum. The loop runs over whole
// vectors, for which the memory behind the scores has room. Rows are short, so that a remainder loop would cost much.
template <typename T>
T weigh(T* scores, int64_t n, int64_t end, T top) {
    end = whole(end, kLanes);
    std::fill(scores + n, scores + end, T(-kInf));
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < end; ++j) {
        scores[j] = weight_of(scores[j] - top);
        sum += scores[j];
    }
    return sum;
}

// Turns the first n of `end` scores into weights e^(score - log_sum), the others into 0. Turns grad, the gradient by
// the weights, into the gradient by the scores.
template <typename T>
void weigh_backward(T* scores, T* grad, int64_t n, int64_t end, T log_sum, T mean_grad) {
    end = whole(end, kLanes);
    std::fill(scores + n, scores + end, T(-kInf));
    std::fill(grad + n, grad + end, T(0));
#pragma omp simd
    for (int64_t j = 0; j < end; ++j) {
        scores[j] = weight_of(scores[j] - log_sum);
        grad[j] = scores[j] * (grad[j] - mean_grad);
    }
}

template <typename In, typename T>
T dot(const T* x, const In* y, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += x[i] * widen(y[i]);
    return sum;
}

struct Sizes {
    int64_t Q, K, D;  // heads of queries; heads of keys and values, a divisor of Q; numbers of a head
};

// The place at which each row of tokens begins, and at the end the number of tokens. No row is longer than L, whatever
// slots hold, because the scratch memory has room for L tokens.
std::vector<int64_t> starts_of(const int64_t* slots, int64_t N, int64_t L) {
    // The rows are counted first, because push_back would leave a function that all instruction sets share.
    auto each = [&](auto found) {
        for (int64_t n = 0, start = 0, end = 0; n < N; ++n)
            if (n == 0 || slots[n] >= end || n - start == L) {
                found(start = n);
                end = (slots[n] / L + 1) * L;
            }
    };
    int64_t rows = 0;
    each([&](int64_t) { ++rows; });
    std::vector<int64_t> starts(rows + 1, N);
    rows = 0;
    each([&](int64_t n) { starts[rows++] = n; });
    return starts;
}

template <typename In, typename T>
void attend(Heads<const In> query, Heads<const In> key, Heads<const In> value, Rotary rotary,
            const std::vector<int64_t>& starts, int64_t L, Sizes sizes, double scale, Heads<In> out, T* log_sums,
            int team) {
    const int64_t Q = sizes.Q, K = sizes.K, D = sizes.D;
    const int64_t N = starts.back(), group = Q / K, keys = whole(L + kRows, kWide), width = whole(D, kWide);
#pragma omp parallel num_threads(team)
    {
        std::vector<T> memory(D * keys + keys * width + 2 * kRows * width + kRows * keys);
        T *keys_t = memory.data(), *values = keys_t + D * keys, *q = values + keys * width, *sums = q + kRows * width,
          *weights = sums + kRows * width;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < int64_t(starts.size() - 1) * K; ++task) {
            const int64_t k = task % K, begin = starts[task / K], n = starts[task / K + 1] - begin;
            load_rows(key.from(k, begin), n, D, T(1), values, width);
            rotate<false>(rotary.from(begin, D), n, D, values, width);
            load_columns(Heads<const T>{values, 0, width}, n, D, keys_t, keys);
            load_rows(value.from(k, begin), n, D, T(1), values, width);
            for (int64_t head = k * group; head < (k + 1) * group; ++head)
                for (int64_t i0 = 0; i0 < n; i0 += kRows) {
                    const int64_t rows = minimum<int64_t>(kRows, n - i0), end = i0 + rows;
                    T totals[kRows];
                    load_rows(query.from(head, begin + i0), rows, D, T(scale), q, width);
                    rotate<false>(rotary.from(begin + i0, D), rows, D, q, width);
                    product<false, false>(q, width, keys_t, keys, D, end, weights, keys);
                    for (int64_t r = 0; r < rows; ++r) {
                        const int64_t seen = i0 + r + 1;
                        const T top = max_of(weights + r * keys, seen);
                        totals[r] = weigh(weights + r * keys, seen, end, top);
                        log_sums[head * N + begin + i0 + r] = top + std::log(totals[r]);
                    }
                    product<false, false>(weights, keys, values, width, end, D, sums, width);
                    for (int64_t r = 0; r < rows; ++r) {
                        for (int64_t c = 0; c < D; ++c) sums[r * width + c] /= totals[r];
                        store(sums + r * width, out.at(head, begin + i0 + r), D);
                    }
                }
        }
    }
}

// grad_score = p (g - sum p g), with p the weights and g the gradient by the weights; sum p g = grad_out . out.
template <typename In, typename T>
void attend_backward(Heads<const In> query, Heads<const In> key, Heads<const In> value, Rotary rotary,
                     Heads<const In> out, const T* log_sums, Heads<const In> grad_out,
                     const std::vector<int64_t>& starts, int64_t L, Sizes sizes, double scale, Heads<In> grad_query,
                     Heads<In> grad_key, Heads<In> grad_value, int team) {
    const int64_t Q = sizes.Q, K = sizes.K, D = sizes.D;
    const int64_t N = starts.back(), group = Q / K, keys = whole(L + kRows, kWide), width = whole(D, kWide);
#pragma omp parallel num_threads(team)
    {
        std::vector<T> memory(2 * D * keys + 3 * keys * width + 2 * kBlockRows * width + 2 * kBlockRows * keys +
                              kRows * width);
        T *keys_t = memory.data(), *values_t = keys_t + D * keys, *scaled_keys = values_t + D * keys,
          *by_key = scaled_keys + keys * width, *by_value = by_key + keys * width, *q = by_value + keys * width,
          *by_out = q + kBlockRows * width, *weights = by_out + kBlockRows * width,
          *by_score = weights + kBlockRows * keys, *by_query = by_score + kBlockRows * keys;
#pragma omp for schedule(dynamic)
        for (int64_t task = 0; task < int64_t(starts.size() - 1) * K; ++task) {
            const int64_t k = task % K, begin = starts[task / K], n = starts[task / K + 1] - begin;
            load_rows(key.from(k, begin), n, D, T(1), scaled_keys, width);
            rotate<false>(rotary.from(begin, D), n, D, scaled_keys, width);
            load_columns(Heads<const T>{scaled_keys, 0, width}, n, D, keys_t, keys);
            for (int64_t i = 0; i < n * width; ++i) scaled_keys[i] *= T(scale);
            load_columns(value.from(k, begin), n, D, values_t, keys);
            std::fill(by_key, by_key + keys * width, T(0));
            std::fill(by_value, by_value + keys * width, T(0));
            for (int64_t head = k * group; head < (k + 1) * group; ++head)
                for (int64_t block = 0; block < n; block += kBlockRows) {
                    const int64_t count = minimum<int64_t>(kBlockRows, n - block);
                    load_rows(query.from(head, begin + block), count, D, T(scale), q, width);
                    rotate<false>(rotary.from(begin + block, D), count, D, q, width);
                    load_rows(grad_out.from(head, begin + block), count, D, T(1), by_out, width);
                    for (int64_t i = 0; i < count; i += kRows) {
                        const int64_t rows = minimum<int64_t>(kRows, count - i), first = begin + block + i;
                        const int64_t end = block + i + kRows;  // the tiles of keys below reach this far
                        product<false, false>(q + i * width, width, keys_t, keys, D, end, weights + i * keys, keys);
                        product<false, false>(by_out + i * width, width, values_t, keys, D, end, by_score + i * keys,
                                              keys);
                        for (int64_t r = 0; r < rows; ++r) {
                            const T mean_grad = dot(by_out + (i + r) * width, out.at(head, first + r), D);
                            weigh_backward(weights + (i + r) * keys, by_score + (i + r) * keys, block + i + r + 1, end,
                                           log_sums[head * N + first + r], mean_grad);
                        }
                        product<false, false>(by_score + i * keys, keys, scaled_keys, width, minimum(end, n), D,
                                              by_query, width);
                        rotate<true>(rotary.from(first, D), rows, D, by_query, width);
                        store_rows(by_query, width, rows, D, grad_query.from(head, first));
                    }
                    for (int64_t j = 0; j < block + count; j += kRows) {
                        const int64_t i = maximum<int64_t>(j - block, 0), left = count - i;  // queries that see key j
                        product<true, true>(weights + i * keys + j, keys, by_out + i * width, width, left, D,
                                            by_value + j * width, width);
                        product<true, true>(by_score + i * keys + j, keys, q + i * width, width, left, D,
                                            by_key + j * width, width);
                    }
                }
            rotate<true>(rotary.from(begin, D), n, D, by_key, width);
            store_rows(by_key, width, n, D, grad_key.from(k, begin));
            store_rows(by_value, width, n, D, grad_value.from(k, begin));
        }
    }
}

}  // namespace

void packed_attention(int dtype, Pointer query, Pointer key, Pointer value, const std::array<int64_t, 6>& strides,
                      Pointer cosines, Pointer sines, Pointer slots, int64_t N, int64_t L, int64_t Q, int64_t K,
                      int64_t D, double scale, Pointer out, Pointer log_sums, int threads) {
    const std::vector<int64_t> starts = starts_of(slots.as<const int64_t>(), N, L);
    const Rotary rotary = {cosines.as<const float>(), sines.as<const float>()};
    const int team = team_size(N * L * Q, threads);
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        attend<In>(Heads<const In>{query.as<const In>(), strides[0], strides[1]},
                   {key.as<const In>(), strides[2], strides[3]}, {value.as<const In>(), strides[4], strides[5]}, rotary,
                   starts, L, {Q, K, D}, scale, {out.as<In>(), D, Q * D}, log_sums.as<Compute<In>>(), team);
        return 0;
    });
}

void packed_attention_backward(int dtype, Pointer query, Pointer key, Pointer value,
                               const std::array<int64_t, 6>& strides, Pointer cosines, Pointer sines, Pointer slots,
                               int64_t N, int64_t L, int64_t Q, int64_t K, int64_t D, double scale, Pointer out,
                               Pointer log_sums, Pointer grad_out, Pointer grad_query, Pointer grad_key,
                               Pointer grad_value, int threads) {
    const std::vector<int64_t> starts = starts_of(slots.as<const int64_t>(), N, L);
    const Rotary rotary = {cosines.as<const float>(), sines.as<const float>()};
    const int team = team_size(N * L * Q, threads);
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        attend_backward<In>(
            Heads<const In>{query.as<const In>(), strides[0], strides[1]}, {key.as<const In>(), strides[2], strides[3]},
            {value.as<const In>(), strides[4], strides[5]}, rotary, {out.as<const In>(), D, Q * D},
            log_sums.as<const Compute<In>>(), {grad_out.as<const In>(), D, Q * D}, starts, L, {Q, K, D}, scale,
            {grad_query.as<In>(), D, Q * D}, {grad_key.as<In>(), D, K * D}, {grad_value.as<In>(), D, K * D}, team);
        return 0;
    });
}

}  // namespace rlhf::ISA
