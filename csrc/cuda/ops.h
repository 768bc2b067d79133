// The CUDA kernels' signatures. They are those of cpu/ops.h with the stream, as an integer, in place of the number of
// threads, without grad_dtype, because a gradient has the logits' dtype, and with further arguments:
//   normalizer   address of a double on the device that replaces the denominator, or 0
//   loss         a tensor of its own for stats[0]
//   scratch      kScratchBytes of device memory that no other stream uses, all 0 before the first launch
// No function waits for the device. A token id out of range therefore gives NaN instead of a row number.
#pragma once
#include "../pointer.h"

namespace rlhf::cuda {

constexpr int kMaxBlocks = 4096;                                  // blocks of a launch that sums over its blocks
constexpr int kSampleTile = 4096;                                 // columns of which sample_tokens keeps one state
constexpr int64_t kScratchBytes = int64_t(kMaxBlocks) * 68 + 32;  // a counter and a partial sum for each block

void token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                    double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                    Pointer scratch, Pointer stream);
void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int64_t grad_row_stride,
                             Pointer stream);

void token_kl(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride, Pointer ids,
              int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs, Pointer entropy,
              Pointer kl, Pointer ref_logprobs, Pointer stats, Pointer stream);
void token_kl_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride,
                       Pointer ids, int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs,
                       Pointer entropy, Pointer stats, Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_kl,
                       Pointer grad_logits, int64_t grad_row_stride, Pointer stream);
// states: 3 doubles for every kSampleTile columns of each row, uninitialised. A row without a distribution gets an
// arbitrary token, and NaN or -inf as its log-prob.
void sample_tokens(Pointer logits, int dtype, int64_t row_stride, int64_t N, int64_t V, double inv_temperature,
                   Pointer uniforms, Pointer greedy, Pointer states, Pointer tokens, Pointer logprobs, Pointer entropy,
                   Pointer stream);

void kl_penalty(int dtype, Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad,
                Pointer stream);
void shape_rewards(int dtype, Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t T,
                   double kl_coef, int estimator, double clip, Pointer out, Pointer stream);

void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t T, double gamma,
         double lam, Pointer advantages, Pointer returns, Pointer stream);
void discounted_returns(int dtype, Pointer rewards, Pointer mask, int64_t B, int64_t T, double gamma, Pointer out,
                        Pointer stream);
void remax_returns(int dtype, Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B,
                   int64_t T, double kl_coef, double gamma, double clip, int variant, Pointer out, Pointer stream);
void rloo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, Pointer stream);
void grpo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, Pointer stream);
void whiten(int dtype, Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, Pointer scratch,
            Pointer stream);

// stats[8] = loss, policy_loss, clip_fraction, approx_kl, ratio_mean, ratio_max, kl, entropy
void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, int objective, bool by_sequence, double clip_low, double clip_high,
              double dual_clip, double tau_pos, double tau_neg, double kl_coef, int estimator, bool kl_by_ratio,
              double entropy_coef, int reduction, double denominator, Pointer normalizer, Pointer grad_logp,
              Pointer grad_entropy, Pointer loss, Pointer stats, Pointer scratch, Pointer stream);
// stats[2] = loss, clip_fraction
void ppo_value_loss(int dtype, Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n,
                    double clip, double denominator, Pointer normalizer, Pointer grad, Pointer loss, Pointer stats,
                    Pointer scratch, Pointer stream);
void reinforce_loss(int dtype, Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t T,
                    int reduction, double denominator, Pointer normalizer, Pointer grad, Pointer loss, Pointer scratch,
                    Pointer stream);

// stats[4] = loss, accuracy, margin, bt_loss
void reward_loss(int dtype, Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef,
                 Pointer grad_chosen, Pointer grad_rejected, Pointer loss, Pointer stats, Pointer scratch,
                 Pointer stream);
// stats[2] = loss, accuracy
void ranking_loss(int dtype, Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer loss,
                  Pointer stats, Pointer scratch, Pointer stream);
void dpo_loss(int dtype, Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected,
              Pointer chosen_lengths, Pointer rejected_lengths, int64_t B, double beta, int loss_type,
              double label_smoothing, double margin, Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards,
              Pointer grad_chosen, Pointer grad_rejected, Pointer stream);

}  // namespace rlhf::cuda
