// silu(gate) up, the middle of a gated MLP, and its gradients. Each pass reads its inputs once and keeps nothing else.
#include "ops.h"
#include "storage.h"

namespace rlhf::ISA {
namespace {

template <typename T>
RLHF_INLINE T logistic(T x) {
    return 1 / (1 + exp_of(-x));
}

template <typename In>
void forward(const In* gate, const In* up, int64_t n, In* out, int team) {
#pragma omp parallel for simd num_threads(team) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const auto g = widen(gate[i]);
        narrow(g * logistic(g) * widen(up[i]), out[i]);
    }
}

template <typename In>
void backward(const In* gate, const In* up, const In* grad_out, int64_t n, In* grad_gate, In* grad_up, int team) {
#pragma omp parallel for simd num_threads(team) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const auto g = widen(gate[i]), y = widen(grad_out[i]), s = logistic(g);
        narrow(y * widen(up[i]) * s * (1 + g * (1 - s)), grad_gate[i]);
        narrow(y * g * s, grad_up[i]);
    }
}

}  // namespace

void swiglu(int dtype, Pointer gate, Pointer up, int64_t n, Pointer out, int threads) {
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        forward(gate.as<const In>(), up.as<const In>(), n, out.as<In>(), team_size(n, threads));
        return 0;
    });
}

void swiglu_backward(int dtype, Pointer gate, Pointer up, Pointer grad_out, int64_t n, Pointer grad_gate,
                     Pointer grad_up, int threads) {
    with_storage(dtype, [&](auto storage) {
        using In = decltype(storage);
        backward(gate.as<const In>(), up.as<const In>(), grad_out.as<const In>(), n, grad_gate.as<In>(),
                 grad_up.as<In>(), team_size(n, threads));
        return 0;
    });
}

}  // namespace rlhf::ISA
