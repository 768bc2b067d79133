// Prints what kernels of the CPU compute of fixed inputs, a number a line, so that two processors can be compared.
// Of a large result it prints some numbers all over it, because an emulator takes longer to print than to compute.
#include <cmath>
#include <cstdio>
#include <vector>

#define ISA scalar
#include "../../csrc/cpu/ops.h"

using rlhf::Pointer;
namespace op = rlhf::scalar;

template <typename T>
Pointer at(std::vector<T>& x) {
    return Pointer{reinterpret_cast<uintptr_t>(x.data())};
}

std::vector<float> wave(int n, double pitch, double size = 1) {
    std::vector<float> x(n);
    for (int i = 0; i < n; ++i) x[i] = float(size * std::sin(pitch * (i + 1)));
    return x;
}

template <typename... Vectors>
void print(const char* name, const Vectors&... vectors) {
    auto each = [&](const auto& x) {
        const size_t step = x.size() / 4000 + 1;
        for (size_t i = 0; i < x.size(); i += step) std::printf("%s %.9g\n", name, double(x[i]));
    };
    (each(vectors), ...);
}

void rows(int N, int V, int threads) {
    auto z = wave(N * V, 0.37, 6), ref = wave(N * V, 0.41, 6), g = wave(N, 1.3);
    z[V - 1] = -INFINITY;
    std::vector<int64_t> ids(N);
    for (int i = 0; i < N; ++i) ids[i] = (i * 7919) % (V - 1);
    std::vector<float> logp(N), entropy(N), kl(N), ref_logp(N), stats(4 * N), grad(N * V);
    op::token_logprobs(at(z), 0, V, at(ids), N, V, 1.25, 0, at(logp), at(entropy), at(stats), threads);
    op::token_logprobs_backward(at(z), 0, V, at(ids), N, V, 1.25, 0, at(logp), at(entropy), at(stats), at(g), at(g),
                                at(grad), 0, V, threads);
    print("token_logprobs", logp, entropy, grad);
    z[V - 1] = 0;
    op::token_kl(at(z), 0, V, at(ref), V, at(ids), N, V, 1, 20, at(logp), at(entropy), at(kl), at(ref_logp), at(stats),
                 threads);
    op::token_kl_backward(at(z), 0, V, at(ref), V, at(ids), N, V, 1, 20, at(logp), at(entropy), at(stats), at(g), at(g),
                          at(g), at(grad), 0, V, threads);
    print("token_kl", logp, entropy, kl, ref_logp, grad);
    std::vector<uint16_t> half(N * V), half_grad(N * V);
    for (int dtype : {1, 2}) {  // bf16, fp16: 1, 1.5 or -2 by the bits
        for (int i = 0; i < N * V; ++i) {
            const int which = i * 31 % 3;
            half[i] = dtype == 1 ? (which == 0 ? 0x3f80 : which == 1 ? 0x3fc0 : 0xc000)
                                 : (which == 0 ? 0x3c00 : which == 1 ? 0x3e00 : 0xc000);
        }
        op::token_logprobs(at(half), dtype, V, at(ids), N, V, 1, 0, at(logp), at(entropy), at(stats), threads);
        op::token_logprobs_backward(at(half), dtype, V, at(ids), N, V, 1, 0, at(logp), at(entropy), at(stats), at(g),
                                    at(g), at(half_grad), dtype, V, threads);
        print(dtype == 1 ? "bf16" : "fp16", logp, entropy);
        print(dtype == 1 ? "bf16_gradient_bits" : "fp16_gradient_bits", half_grad);
    }
    std::vector<double> uniforms(N);
    for (int i = 0; i < N; ++i) uniforms[i] = std::fabs(std::sin(i + 1.0)) * 0.999;
    op::sample_tokens(at(z), 0, V, N, V, 1, at(uniforms), Pointer{}, at(ids), at(logp), at(entropy), threads);
    print("sample_tokens", ids, logp, entropy);
}

void losses(int B, int T, int threads) {
    const int n = B * T;
    auto logp = wave(n, 0.3), old = wave(n, 0.31), ref = wave(n, 0.29), entropy = wave(n, 0.7), adv = wave(n, 0.9);
    auto values = wave(n, 0.13), scores = wave(B, 0.5);
    std::vector<uint8_t> mask(n);
    for (int i = 0; i < n; ++i) mask[i] = i % 5 != 0;
    std::vector<float> a(n), b(n), c(B), d(B), e(B), stats(8);
    op::ppo_loss(0, at(logp), at(old), at(adv), true, at(mask), at(ref), at(entropy), B, T, 0, false, 0.2, 0.3, 3, 0, 0,
                 0.1, 2, false, 0.01, 0, 0, at(a), at(b), at(stats), threads);
    print("ppo_loss", stats, a, b);
    op::gae(0, at(logp), at(values), at(mask), Pointer{}, B, T, 0.99, 0.95, at(a), at(b), threads);
    print("gae", a, b);
    op::whiten(0, at(adv), at(mask), n, true, at(a), threads);
    print("whiten", a);
    for (int estimator : {0, 1, 2}) {
        op::kl_penalty(0, at(logp), at(ref), n, estimator, at(a), at(b), threads);
        print("kl_penalty", a, b);
    }
    auto chosen = wave(B, 0.2), rejected = wave(B, 0.4), mine = wave(B, 0.6), theirs = wave(B, 0.8);
    std::vector<float> f(B), g(B);
    op::dpo_loss(0, at(chosen), at(rejected), at(mine), at(theirs), Pointer{}, Pointer{}, B, 0.1, 0, 0.1, 0, at(c),
                 at(d), at(e), at(f), at(g), threads);
    print("dpo_loss", c, d, e, f, g);
    op::reward_loss(0, at(chosen), at(rejected), Pointer{}, B, 0.1, at(c), at(d), at(stats), threads);
    print("reward_loss", c, d);
}

void layers(int N, int H, int threads) {
    auto x = wave(N * H, 0.17), delta = wave(N * H, 0.19), weight = wave(H, 0.23), g = wave(N * H, 0.31);
    std::vector<float> sum(N * H), out(N * H), scales(N), grad(N * H), grad_weight(H);
    op::add_rms_norm(0, at(x), at(delta), at(weight), N, H, 1e-6, at(sum), at(out), at(scales), threads);
    op::add_rms_norm_backward(0, at(sum), at(weight), at(scales), at(g), Pointer{}, N, H, at(grad), at(grad_weight),
                              threads);
    print("add_rms_norm", sum, out, scales, grad, grad_weight);
    op::swiglu(0, at(x), at(delta), N * H, at(out), threads);
    op::swiglu_backward(0, at(x), at(delta), at(g), N * H, at(grad), at(sum), threads);
    print("swiglu", out, grad, sum);
}

int main() {
    rows(3, 1009, 1);
    rows(2, 70001, 2);  // large enough for two threads
    losses(5, 60, 1);
    layers(4, 77, 1);
}
