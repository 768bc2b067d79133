// RMS norm of the sum of two tensors, as in a transformer's layers, and its gradients. Each pass reads its inputs once.
#include <vector>

#include "ops.h"
#include "storage.h"

namespace rlhf::ISA {
namespace {

constexpr int64_t kBlockRows = 64;  // rows whose weight gradients are summed first, so that the order is fixed

template <typename In>
void forward(const In* x, const In* delta, const In* weight, int64_t N, int64_t H, double epsilon, In* sum, In* out,
             Compute<In>* scales, int team) {
    using T = Compute<In>;
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t n = 0; n < N; ++n) {
        const In* z = x + n * H;
        In* y = out + n * H;
        if (delta) {
            In* s = sum + n * H;
            const In* d = delta + n * H;
#pragma omp simd
            for (int64_t i = 0; i < H; ++i) narrow(widen(z[i]) + widen(d[i]), s[i]);
            z = s;
        }
        T squares = 0;
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < H; ++i) squares += widen(z[i]) * widen(z[i]);
        const T scale = T(1 / std::sqrt(double(squares) / double(H) + epsilon));
#pragma omp simd
        for (int64_t i = 0; i < H; ++i) narrow(widen(z[i]) * scale * widen(weight[i]), y[i]);
        if (scales) scales[n] = scale;
    }
}

// y = w z r with r the scale and g the gradient by y: dz = r w g - z r^3 mean(w g z), dw = the sum over rows of g z r.
template <typename In>
void backward(const In* sum, const In* weight, const Compute<In>* scales, const In* grad_out, const In* grad_sum,
              int64_t N, int64_t H, In* grad_x, In* grad_weight, int team) {
    using T = Compute<In>;
    const int64_t blocks = (N + kBlockRows - 1) / kBlockRows;
    std::vector<T> by_block(grad_weight ? blocks * H : 0, T(0));
#pragma omp parallel for num_threads(team) schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
        T* by_weight = by_block.data() + block * H;
        for (int64_t n = block * kBlockRows; n < minimum(N, (block + 1) * kBlockRows); ++n) {
            const In *z = sum + n * H, *g = grad_out + n * H, *more = grad_sum + n * H;
            In* to = grad_x + n * H;
            const T scale = scales[n];
            T dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < H; ++i) dot += widen(weight[i]) * widen(g[i]) * widen(z[i]);
            const T shared = dot * scale * scale / T(H);
            if (grad_sum) {
#pragma omp simd
                for (int64_t i = 0; i < H; ++i)
                    narrow(scale * (widen(weight[i]) * widen(g[i]) - widen(z[i]) * shared) + widen(more[i]), to[i]);
            } else {
#pragma omp simd
                for (int64_t i = 0; i < H; ++i)
                    narrow(scale * (widen(weight[i]) * widen(g[i]) - widen(z[i]) * shared), to[i]);
            }
            if (!grad_weight) continue;
#pragma omp simd
            for (int64_t i = 0; i < H; ++i) by_weight[i] += widen(g[i]) * widen(z[i]) * scale;
        }
    }
    if (!grad_weight) return;
    std::vector<T> total(H, T(0));
    for (int64_t block = 0; block < blocks; ++block)
#pragma omp simd
        for (int64_t i = 0; i < H; ++i) total[i] += by_block[block * H + i];
    store(total.data(), grad_weight, H);
}

}  // namespace

void add_rms_norm(int dtype, Pointer x, Pointer delta, Pointer weight, int64_t N, int64_t H, double epsilon,
                  Pointer sum, Pointer out, Pointer scales, int threads) {
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        forward(x.as<const In>(), delta.as<const In>(), weight.as<const In>(), N, H, epsilon, sum.as<In>(),
                out.as<In>(), scales.as<Compute<In>>(), team_size(N * H, threads));
        return 0;
    });
}

void add_rms_norm_backward(int dtype, Pointer sum, Pointer weight, Pointer scales, Pointer grad_out, Pointer grad_sum,
                           int64_t N, int64_t H, Pointer grad_x, Pointer grad_weight, int threads) {
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        backward(sum.as<const In>(), weight.as<const In>(), scales.as<const Compute<In>>(), grad_out.as<const In>(),
                 grad_sum.as<const In>(), N, H, grad_x.as<In>(), grad_weight.as<In>(), team_size(N * H, threads));
        return 0;
    });
}

}  // namespace rlhf::ISA
