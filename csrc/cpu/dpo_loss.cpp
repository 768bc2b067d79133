// Direct preference losses per pair, their rewards and gradients. The arithmetic runs in double, because B is small.
#include "../pair_terms.h"
#include "ops.h"

namespace rlhf::ISA {
namespace {

template <typename T>
void dpo(Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected, Pointer chosen_lengths,
         Pointer rejected_lengths, int64_t B, double beta, int loss_type, double label_smoothing, double margin,
         Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards, Pointer grad_chosen, Pointer grad_rejected) {
    const auto at = [](Pointer x, int64_t b, double absent) { return x ? double(x.as<T>()[b]) : absent; };
    for (int64_t b = 0; b < B; ++b) {
        const double c = at(chosen, b, 0) - at(ref_chosen, b, 0), r = at(rejected, b, 0) - at(ref_rejected, b, 0);
        const PairOutcome pair = dpo_pair(c, r, at(chosen_lengths, b, 1), at(rejected_lengths, b, 1), beta, loss_type,
                                          label_smoothing, margin);
        losses.as<T>()[b] = T(pair.term.value);
        chosen_rewards.as<T>()[b] = T(pair.chosen_reward);
        rejected_rewards.as<T>()[b] = T(pair.rejected_reward);
        if (grad_chosen) grad_chosen.as<T>()[b] = T(pair.term.grad_chosen);
        if (grad_rejected) grad_rejected.as<T>()[b] = T(pair.term.grad_rejected);
    }
}

}  // namespace

void dpo_loss(int dtype, Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected,
              Pointer chosen_lengths, Pointer rejected_lengths, int64_t B, double beta, int loss_type,
              double label_smoothing, double margin, Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards,
              Pointer grad_chosen, Pointer grad_rejected, int) {
    RLHF_BY_DTYPE(dpo, chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, B, beta, loss_type,
                  label_smoothing, margin, losses, chosen_rewards, rejected_rewards, grad_chosen, grad_rejected);
}

}  // namespace rlhf::ISA
