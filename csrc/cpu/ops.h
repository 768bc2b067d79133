// Every CPU kernel's signature. The file has no include guard, because bind_cpu.cpp includes it once per instruction
// set, with ISA defined as the set's name.
//
// Pointers arrive as integers (0 = absent). dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. The losses, KL
// penalties, returns and advantages take dtype 0 or 3, which all their float pointers have. Masks have one byte per
// element. Tensors are contiguous; row strides are in elements. The results do not depend on the number of threads.
#include <array>

#include "../pointer.h"

namespace rlhf::ISA {

// Returns -1, or the first row whose token id is outside [0, V) and not -100. stats[N, 2], which the backward pass
// reads: a shift near the row's largest logit (after the softcap, before the temperature), and the log of the sum of
// e^((logit - shift) / temperature). The gradient has the logits' dtype, or is bfloat16 by float logits; it may lie
// over the logits, each row at the start of the row's memory.
int64_t token_logprobs(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                       double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                       int threads);
void token_logprobs_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ids, int64_t N, int64_t V,
                             double inv_temperature, double softcap, Pointer logprobs, Pointer entropy, Pointer stats,
                             Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_logits, int grad_dtype,
                             int64_t grad_row_stride, int threads);
// token_logprobs of the policy's logits, and the KL to the reference's ref_logits. stats[N, 4]: the policy's shift and
// log of the sum as above; a centre, the policy's mean of ref_logit - logit, rounded; the policy's mean of
// (ref_logit - logit - centre) / temperature, NaN where the KL is infinite.
int64_t token_kl(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride, Pointer ids,
                 int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs, Pointer entropy,
                 Pointer kl, Pointer ref_logprobs, Pointer stats, int threads);
void token_kl_backward(Pointer logits, int dtype, int64_t row_stride, Pointer ref_logits, int64_t ref_row_stride,
                       Pointer ids, int64_t N, int64_t V, double inv_temperature, double softcap, Pointer logprobs,
                       Pointer entropy, Pointer stats, Pointer grad_logprobs, Pointer grad_entropy, Pointer grad_kl,
                       Pointer grad_logits, int grad_dtype, int64_t grad_row_stride, int threads);
// Returns -1, or the first row without a distribution: a row with NaN or +inf, or with no logit above -inf.
int64_t sample_tokens(Pointer logits, int dtype, int64_t row_stride, int64_t N, int64_t V, double inv_temperature,
                      Pointer uniforms, Pointer greedy, Pointer tokens, Pointer logprobs, Pointer entropy, int threads);

// sums [M, N] = left [M, K] x right [K, N], or sums += ... with `add`: bfloat16 factors, float sums, by the unit of
// `bf16_units` with this number. One stride of each factor is 1. Returns false, and does nothing, where this
// instruction set has no unit.
bool matmul_bf16(int unit, int64_t M, int64_t N, int64_t K, Pointer left, int64_t left_row_stride,
                 int64_t left_k_stride, Pointer right, int64_t right_k_stride, int64_t right_column_stride,
                 Pointer sums, int64_t sums_row_stride, bool add, int threads);

// Attention of one new token of each of n rows. heads [n, Q + 2 K, D] holds the token's queries, keys and values. The
// kernel writes keys and values to slot `slot` of cache [n, 2 K, S, D]. The queries attend to the slots from
// starts[row] to `slot`, or to the last `window` of these (0: to all). cosines and sines are float [positions, D],
// absent for models without rotary embedding. All other floats have dtype 0, 1 or 2.
void decode_attention(int dtype, Pointer heads, int64_t n, int64_t Q, int64_t K, int64_t D, Pointer cosines,
                      Pointer sines, Pointer positions, Pointer starts, Pointer cache, int64_t S, int64_t slot,
                      int64_t window, double scale, double softcap, Pointer out, int threads);

// sum [N, H] = x + delta, out = sum scale weight, scales [N] = 1 / sqrt(mean(sum^2) + epsilon) in the compute type.
// Without delta, x is the sum and `sum` is not written. scales may be absent. The backward pass takes the gradient by
// out, and by sum if that gradient is present. grad_x is the gradient by x and by delta; grad_weight may be absent.
void add_rms_norm(int dtype, Pointer x, Pointer delta, Pointer weight, int64_t N, int64_t H, double epsilon,
                  Pointer sum, Pointer out, Pointer scales, int threads);
void add_rms_norm_backward(int dtype, Pointer sum, Pointer weight, Pointer scales, Pointer grad_out, Pointer grad_sum,
                           int64_t N, int64_t H, Pointer grad_x, Pointer grad_weight, int threads);
// out = silu(gate) up, for n numbers each.
void swiglu(int dtype, Pointer gate, Pointer up, int64_t n, Pointer out, int threads);
void swiglu_backward(int dtype, Pointer gate, Pointer up, Pointer grad_out, int64_t n, Pointer grad_gate,
                     Pointer grad_up, int threads);

// Causal attention within rows whose N tokens stand side by side. slots [N] ascends; it holds row * L + place in the
// row. query is [Q, N, D], key and value are [K, N, D]; Q / K query heads share one key head. strides: by head and by
// token, for query, key and value in turn; the last dimension is contiguous. cosines and sines, or absent: float [N, D]
// of the tokens' rotary embedding, which rotates the halves of D with each other. out and the gradients are [N, heads,
// D]. log_sums [Q, N]: the log of the sum of e^score in the compute type, which the backward pass reads.
void packed_attention(int dtype, Pointer query, Pointer key, Pointer value, const std::array<int64_t, 6>& strides,
                      Pointer cosines, Pointer sines, Pointer slots, int64_t N, int64_t L, int64_t Q, int64_t K,
                      int64_t D, double scale, Pointer out, Pointer log_sums, int threads);
void packed_attention_backward(int dtype, Pointer query, Pointer key, Pointer value,
                               const std::array<int64_t, 6>& strides, Pointer cosines, Pointer sines, Pointer slots,
                               int64_t N, int64_t L, int64_t Q, int64_t K, int64_t D, double scale, Pointer out,
                               Pointer log_sums, Pointer grad_out, Pointer grad_query, Pointer grad_key,
                               Pointer grad_value, int threads);

void kl_penalty(int dtype, Pointer logp, Pointer ref, int64_t n, int estimator, Pointer out, Pointer grad, int threads);
void shape_rewards(int dtype, Pointer scores, Pointer logp, Pointer ref, Pointer mask, int64_t B, int64_t T,
                   double kl_coef, int estimator, double clip, Pointer out, int threads);

// lams: a lambda for each row in place of lam, or absent.
void gae(int dtype, Pointer rewards, Pointer values, Pointer mask, Pointer lams, int64_t B, int64_t T, double gamma,
         double lam, Pointer advantages, Pointer returns, int threads);
void discounted_returns(int dtype, Pointer rewards, Pointer mask, int64_t B, int64_t T, double gamma, Pointer out,
                        int threads);
void remax_returns(int dtype, Pointer scores, Pointer greedy, Pointer logp, Pointer ref, Pointer mask, int64_t B,
                   int64_t T, double kl_coef, double gamma, double clip, int variant, Pointer out, int threads);
void rloo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, int threads);
void grpo_advantages(int dtype, Pointer scores, int64_t B, int64_t group, Pointer out, int threads);
void whiten(int dtype, Pointer x, Pointer mask, int64_t n, bool shift_mean, Pointer out, int threads);

// stats[8] = loss, policy_loss, clip_fraction, approx_kl, ratio_mean, ratio_max, kl, entropy. by_sequence: every token
// has the ratio of its row, whose log is the mean of the row's log-ratios. kl_by_ratio: the KL terms are multiplied by
// the ratios, through which gradients flow.
void ppo_loss(int dtype, Pointer logp, Pointer old_logp, Pointer advantages, bool per_token, Pointer mask, Pointer ref,
              Pointer entropy, int64_t B, int64_t T, int objective, bool by_sequence, double clip_low, double clip_high,
              double dual_clip, double tau_pos, double tau_neg, double kl_coef, int estimator, bool kl_by_ratio,
              double entropy_coef, int reduction, double denominator, Pointer grad_logp, Pointer grad_entropy,
              Pointer stats, int threads);
// stats[2] = loss, clip_fraction
void ppo_value_loss(int dtype, Pointer values, Pointer old_values, Pointer returns, Pointer mask, int64_t n,
                    double clip, double denominator, Pointer grad, Pointer stats, int threads);
void reinforce_loss(int dtype, Pointer logp, Pointer advantages, bool per_token, Pointer mask, int64_t B, int64_t T,
                    int reduction, double denominator, Pointer grad, Pointer loss, int threads);

// stats[4] = loss, accuracy, margin, bt_loss
void reward_loss(int dtype, Pointer chosen, Pointer rejected, Pointer margin, int64_t B, double center_coef,
                 Pointer grad_chosen, Pointer grad_rejected, Pointer stats, int threads);
// stats[2] = loss, accuracy
void ranking_loss(int dtype, Pointer scores, Pointer ranks, int64_t B, int64_t K, Pointer grad, Pointer stats,
                  int threads);
void dpo_loss(int dtype, Pointer chosen, Pointer rejected, Pointer ref_chosen, Pointer ref_rejected,
              Pointer chosen_lengths, Pointer rejected_lengths, int64_t B, double beta, int loss_type,
              double label_smoothing, double margin, Pointer losses, Pointer chosen_rewards, Pointer rejected_rewards,
              Pointer grad_chosen, Pointer grad_rejected, int threads);

}  // namespace rlhf::ISA
