// Direct preference losses per pair, their rewards and gradients. A thread takes a pair. The arithmetic runs in double,
// because B is small.
#include "launch.cuh"

namespace rlhf::cuda {
namespace {

template <typename T>
struct DPOTensors {
    const T *chosen, *rejected, *ref_chosen, *ref_rejected, *chosen_lengths, *rejected_lengths;
    T *losses, *chosen_rewards, *rejected_rewards, *grad_chosen, *grad_rejected;
};

template <typename T>
__device__ double at(const T* x, int64_t b, double absent) {
    return x ? double(x[b]) : absent;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    dpo_pairs(DPOTensors<T> x, int64_t B, double beta, int loss_type, double label_smoothing, double margin) {
    const int64_t b = blockIdx.x * int64_t(blockDim.x) + threadIdx.x;
    if (b >= B) return;
    const double c = at(x.chosen, b, 0) - at(x.ref_chosen, b, 0), r = at(x.rejected, b, 0) - at(x.ref_rejected, b, 0);
    const PairOutcome pair = dpo_pair(c, r, at(x.chosen_lengths, b, 1), at(x.rejected_lengths, b, 1), beta, loss_type,
                                      label_smoothing, margin);
    x.losses[b] = T(pair.term.value);
    x.chosen_rewards[b] = T(pair.chosen_reward);
    x.rejected_rewards[b] = T(pair.rejected_reward);
    if (x.grad_chosen) x.grad_chosen[b] = T(pair.term.grad_chosen);
    if (x.grad_rejected) x.grad_rejected[b] = T(pair.term.grad_rejected);
}

template <typename T>
void launch_dpo(Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected, Pointer chosen_lengths,
                Pointer rejected_lengths, int64_t B, double beta, int loss_type, double label_smoothing, double margin,
                Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards, Pointer grad_chosen,
                Pointer grad_rejected, Pointer stream) {
    const DPOTensors<T> tensors = {chosen.as<const T>(),
                                   rejected.as<const T>(),
                                   ref_chosen.as<const T>(),
                                   ref_rejected.as<const T>(),
                                   chosen_lengths.as<const T>(),
                                   rejected_lengths.as<const T>(),
                                   losses.as<T>(),
                                   chosen_rewards.as<T>(),
                                   rejected_rewards.as<T>(),
                                   grad_chosen.as<T>(),
                                   grad_rejected.as<T>()};
    constexpr int threads = 64;  // small blocks spread the usual few pairs over more multiprocessors
    launch("dpo_loss", stream, dpo_pairs<T>, blocks_for(B, threads), threads, tensors, B, beta, loss_type,
           label_smoothing, margin);
}

}  // namespace

void dpo_loss(int dtype, Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected,
              Pointer chosen_lengths, Pointer rejected_lengths, int64_t B, double beta, int loss_type,
              double label_smoothing, double margin, Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards,
              Pointer grad_chosen, Pointer grad_rejected, Pointer stream) {
    RLHF_BY_DTYPE(launch_dpo, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, B, beta,
                  loss_type, label_smoothing, margin, losses, chosen_rewards, rejected_rewards, grad_chosen,
                  grad_rejected, stream);
}

}  // namespace rlhf::cuda
