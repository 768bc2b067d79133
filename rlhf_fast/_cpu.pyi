"""The CPU kernels of csrc/cpu/ops.h, which describes every argument, on addresses of tensors (0: absent).

dtype: 0 float32, 1 bfloat16, 2 float16, 3 float64. Arguments are positional.
tests/core/test_stubs.py compares this file with the header.
"""

# fmt: off
from collections.abc import Sequence

def isa() -> str:
    """The instruction set in use: scalar, avx2 or avx512."""

def isas() -> list[str]:
    """Every instruction set of this CPU, the widest last."""

def set_isa(name: str, /) -> None:
    """Use this instruction set; ValueError if the CPU does not have it."""

def bf16_units() -> list[int]:
    """The units of this CPU, in this instruction set, that multiply bfloat16: 1 vdpbf16ps, 2 AMX."""

def bf16_unit() -> int:
    """The unit that is faster than float32 in the fused heads; 0: none."""

def token_logprobs(
    logits: int, dtype: int, row_stride: int, ids: int, N: int, V: int, inv_temperature: float, softcap: float,
    logprobs: int, entropy: int, stats: int, threads: int, /,
) -> int:
    """Log-prob of each token and entropy of each row; -1, or the first row whose token id is out of range."""

def token_logprobs_backward(
    logits: int, dtype: int, row_stride: int, ids: int, N: int, V: int, inv_temperature: float, softcap: float,
    logprobs: int, entropy: int, stats: int, grad_logprobs: int, grad_entropy: int, grad_logits: int,
    grad_dtype: int, grad_row_stride: int, threads: int, /,
) -> None:
    """Gradient of log-probs and entropies by the logits; grad_logits may be logits."""

def token_kl(
    logits: int, dtype: int, row_stride: int, ref_logits: int, ref_row_stride: int, ids: int, N: int, V: int,
    inv_temperature: float, softcap: float, logprobs: int, entropy: int, kl: int, ref_logprobs: int, stats: int,
    threads: int, /,
) -> int:
    """Log-probs, entropy and KL to the reference; -1, or the first row whose token id is out of range."""

def token_kl_backward(
    logits: int, dtype: int, row_stride: int, ref_logits: int, ref_row_stride: int, ids: int, N: int, V: int,
    inv_temperature: float, softcap: float, logprobs: int, entropy: int, stats: int, grad_logprobs: int,
    grad_entropy: int, grad_kl: int, grad_logits: int, grad_dtype: int, grad_row_stride: int, threads: int, /,
) -> None:
    """Gradient of log-probs, entropies and KL by the logits; grad_logits may be logits."""

def sample_tokens(
    logits: int, dtype: int, row_stride: int, N: int, V: int, inv_temperature: float, uniforms: int, greedy: int,
    tokens: int, logprobs: int, entropy: int, threads: int, /,
) -> int:
    """A token per row, its log-prob and the entropy; -1, or the first row without a distribution."""

def matmul_bf16(
    unit: int, M: int, N: int, K: int, left: int, left_row_stride: int, left_k_stride: int, right: int,
    right_k_stride: int, right_column_stride: int, sums: int, sums_row_stride: int, add: bool, threads: int, /,
) -> bool:
    """Product of bfloat16 matrices with float32 sums; False where this instruction set has no unit for it."""

def decode_attention(
    dtype: int, heads: int, n: int, Q: int, K: int, D: int, cosines: int, sines: int, positions: int, starts: int,
    cache: int, S: int, slot: int, window: int, scale: float, softcap: float, out: int, threads: int, /,
) -> None:
    """Attention of one new token per row over its cache, after writing its key and value there."""

def add_rms_norm(
    dtype: int, x: int, delta: int, weight: int, N: int, H: int, epsilon: float, sum: int, out: int, scales: int,
    threads: int, /,
) -> None:
    """RMS norm of x + delta, and that sum."""

def add_rms_norm_backward(
    dtype: int, sum: int, weight: int, scales: int, grad_out: int, grad_sum: int, N: int, H: int, grad_x: int,
    grad_weight: int, threads: int, /,
) -> None:
    """Gradients of the RMS norm by its input and weight."""

def swiglu(dtype: int, gate: int, up: int, n: int, out: int, threads: int, /) -> None:
    """silu(gate) * up."""

def swiglu_backward(
    dtype: int, gate: int, up: int, grad_out: int, n: int, grad_gate: int, grad_up: int, threads: int, /,
) -> None:
    """Gradients of silu(gate) * up by gate and up."""

def packed_attention(
    dtype: int, query: int, key: int, value: int, strides: Sequence[int], cosines: int, sines: int, slots: int,
    N: int, L: int, Q: int, K: int, D: int, scale: float, out: int, log_sums: int, threads: int, /,
) -> None:
    """Causal attention within rows whose tokens stand side by side."""

def packed_attention_backward(
    dtype: int, query: int, key: int, value: int, strides: Sequence[int], cosines: int, sines: int, slots: int,
    N: int, L: int, Q: int, K: int, D: int, scale: float, out: int, log_sums: int, grad_out: int, grad_query: int,
    grad_key: int, grad_value: int, threads: int, /,
) -> None:
    """Gradients of packed attention by query, key and value."""

def kl_penalty(dtype: int, logp: int, ref: int, n: int, estimator: int, out: int, grad: int, threads: int, /) -> None:
    """KL estimate of each token, and its derivative by the log-prob."""

def shape_rewards(
    dtype: int, scores: int, logp: int, ref: int, mask: int, B: int, T: int, kl_coef: float, estimator: int,
    clip: float, out: int, threads: int, /,
) -> None:
    """Per-token rewards: minus the weighted KL, and the score on the last True token of a row."""

def gae(
    dtype: int, rewards: int, values: int, mask: int, lams: int, B: int, T: int, gamma: float, lam: float,
    advantages: int, returns: int, threads: int, /,
) -> None:
    """Generalised advantage estimates, and the returns they imply."""

def discounted_returns(
    dtype: int, rewards: int, mask: int, B: int, T: int, gamma: float, out: int, threads: int, /,
) -> None:
    """Discounted sum of the rewards from each token on."""

def remax_returns(
    dtype: int, scores: int, greedy: int, logp: int, ref: int, mask: int, B: int, T: int, kl_coef: float,
    gamma: float, clip: float, variant: int, out: int, threads: int, /,
) -> None:
    """ReMax's weight of each token; variant: index in REMAX_VARIANTS."""

def rloo_advantages(dtype: int, scores: int, B: int, group: int, out: int, threads: int, /) -> None:
    """Score less the mean of the group's other scores."""

def grpo_advantages(dtype: int, scores: int, B: int, group: int, out: int, threads: int, /) -> None:
    """Score less the group's mean, over the group's standard deviation."""

def whiten(dtype: int, x: int, mask: int, n: int, shift_mean: bool, out: int, threads: int, /) -> None:
    """x scaled to variance 1 over the True places, and to mean 0 if shift_mean."""

def ppo_loss(
    dtype: int, logp: int, old_logp: int, advantages: int, per_token: bool, mask: int, ref: int, entropy: int,
    B: int, T: int, objective: int, by_sequence: bool, clip_low: float, clip_high: float, dual_clip: float,
    tau_pos: float, tau_neg: float, kl_coef: float, estimator: int, kl_by_ratio: bool, entropy_coef: float,
    reduction: int, denominator: float, grad_logp: int, grad_entropy: int, stats: int, threads: int, /,
) -> None:
    """Clipped policy loss with KL and entropy terms: 8 statistics and the gradients."""

def ppo_value_loss(
    dtype: int, values: int, old_values: int, returns: int, mask: int, n: int, clip: float, denominator: float,
    grad: int, stats: int, threads: int, /,
) -> None:
    """Clipped value loss: loss, clip fraction and the gradient."""

def reinforce_loss(
    dtype: int, logp: int, advantages: int, per_token: bool, mask: int, B: int, T: int, reduction: int,
    denominator: float, grad: int, loss: int, threads: int, /,
) -> None:
    """REINFORCE loss and its gradient."""

def reward_loss(
    dtype: int, chosen: int, rejected: int, margin: int, B: int, center_coef: float, grad_chosen: int,
    grad_rejected: int, stats: int, threads: int, /,
) -> None:
    """Bradley-Terry loss of pairs: 4 statistics and the gradients."""

def ranking_loss(dtype: int, scores: int, ranks: int, B: int, K: int, grad: int, stats: int, threads: int, /) -> None:
    """Bradley-Terry loss of all pairs of K ranked answers: loss, accuracy and the gradient."""

def dpo_loss(
    dtype: int, chosen: int, rejected: int, ref_chosen: int, ref_rejected: int, chosen_lengths: int,
    rejected_lengths: int, B: int, beta: float, loss_type: int, label_smoothing: float, margin: float, losses: int,
    chosen_rewards: int, rejected_rewards: int, grad_chosen: int, grad_rejected: int, threads: int, /,
) -> None:
    """Direct preference loss and rewards of each pair, and the gradients; loss_type: index in LOSS_TYPES."""
