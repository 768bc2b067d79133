// The CUDA kernels' signatures: those of cpu/ops.h with the stream, as an integer, in place of the thread count.
// Launches only: nothing here waits for the device, so token ids out of range give NaN instead of a row number.
#pragma once
#include "../cpu/pointer.h"

namespace rlhf::cuda {

void token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                    double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                    Pointer stream);
void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride,
                             Pointer stream);

void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, int64_t B, int64_t T, double gamma, double lam,
         Pointer advantages, Pointer returns, Pointer stream);

// stats[8] = loss, policy_loss, clip_fraction, approx_kl, ratio_mean, ratio_max, kl, entropy
void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, double clip_low, double clip_high, double dual_clip,
              double kl_coef, int estimator, double entropy_coef, int reduction, double denominator, Pointer grad_logp,
              Pointer grad_entropy, Pointer stats, Pointer stream);

}  // namespace rlhf::cuda
