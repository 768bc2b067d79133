"""The operators behind `rlhf_fast.ops.linear_losses`: schema, kernel, fake kernel, autograd.

Each returns its loss and, as its last outputs, the loss's gradients by hidden, weight and bias, made on the way.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.dispatch import LIBRARY, define, kernel
from rlhf_fast.ops.dpo import mixture
from rlhf_fast.ops.gradients import register_consumed_gradients
from rlhf_fast.ops.heads import Head, full_precision, loss_in_forward, pack_rows
from rlhf_fast.ops.linear import empty_gradients
from rlhf_fast.ops.pair_options import PairConstants, PairOptions
from rlhf_fast.ops.policy_options import SCHEMA, PolicyOptions
from rlhf_fast.ops.reference import compute_dtype

GRADIENTS = "Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias"
HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor token_ids"
OPTIONS = "float temperature, float softcap, int memory_budget, bool with_hidden, bool with_weight, bool with_bias"
define(
    f"linear_weighted_loss({HEAD}, Tensor weights, {OPTIONS}) "
    f"-> (Tensor loss, Tensor logprobs, Tensor entropy, {GRADIENTS})"
)
define(
    f"linear_ppo_loss({HEAD}, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    f"Tensor? normalizer, {SCHEMA}, float entropy_coef, str reduction, {OPTIONS}) "
    f"-> (Tensor loss, Tensor stats, Tensor logprobs, Tensor entropy, {GRADIENTS})"
)
define(
    f"linear_dpo_loss({HEAD}, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_lengths, "
    "Tensor? rejected_lengths, Tensor? mean_length, Tensor? normalizer, str[] terms, float[] weights, float beta, "
    f"float label_smoothing, float margin, {OPTIONS}) "
    "-> (Tensor loss, Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, Tensor logps, "
    f"{GRADIENTS})"
)


def token_weights(mask: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The factor of each token's loss under a reduction, [B, T] float64, 0 where masked; token_mean: 1 / tokens."""
    if normalizer is None:
        normalizer = mask.shape[0] if reduction.startswith("sequence") else mask.sum()
    weights = over(mask, normalizer)
    return weights / mask.sum(1, keepdim=True).clamp(min=1) if reduction == "sequence_mean" else weights


def over(mask: Tensor, denominator: float | Tensor) -> Tensor:
    """mask / denominator in float64. A tensor that holds 0, of a batch in which nothing counts, gives no NaN."""
    if isinstance(denominator, Tensor):
        denominator = denominator.double().clamp(min=torch.finfo(torch.float64).tiny)
    return mask.double() / denominator


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, options: tuple[Any, ...]) -> Head:
    """The head of an operator whose last arguments `options` are the arguments OPTIONS of its schema."""
    temperature, softcap, memory_budget, *wanted = options
    tensors = hidden, weight, bias, token_ids
    return Head(*tensors, temperature, softcap, memory_budget, tuple(wanted), scaled_later=True)


@kernel("linear_weighted_loss", "cpu", "triton", "cuda")
@full_precision
def _weighted(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    """loss = sum(weights * logprobs)"""
    head = head_of(hidden, weight, bias, token_ids, options)
    flat = weights.reshape(-1).to(head.dtype)
    logprobs, entropy = loss_in_forward(head, None, lambda rows, *_: (flat[rows], None))
    shape = token_ids.shape
    return (flat * logprobs).sum(), logprobs.view(shape), entropy.view(shape), *head.gradients()


@torch.library.register_fake("rlhf_fast::linear_weighted_loss", lib=LIBRARY)
def _weighted_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, weights: Tensor, *options: Any
) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden, weight, bias)
    per_token = (hidden.new_empty(token_ids.shape, dtype=dtype) for _ in range(2))
    return hidden.new_empty((), dtype=dtype), *per_token, *empty_gradients(hidden, weight, bias, options[-3:], True)


register_consumed_gradients("linear_weighted_loss", "hidden", "weight", "bias")


@kernel("linear_ppo_loss", "cpu", "triton", "cuda")
@full_precision
def _ppo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    terms, (entropy_coef, reduction, *rest) = PolicyOptions(*options[:10]), options[10:]
    head = head_of(hidden, weight, bias, token_ids, tuple(rest))
    old, A = old_logprobs.to(head.dtype), advantages.to(head.dtype)
    ref = None if ref_logprobs is None else ref_logprobs.to(head.dtype)
    A_BT = (A if A.dim() == 2 else A.unsqueeze(1)).expand_as(old)
    B, T = token_ids.shape
    weights = token_weights(mask, reduction, normalizer).to(head.dtype).reshape(-1)
    one = torch.ones((), dtype=torch.float64)

    def coefficients(rows: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        """The unweighted loss's gradient by each token's log-prob, times the token's weight."""
        if terms.by_sequence:  # a pack has whole rows
            row, nth = torch.unique_consecutive(rows // T, return_inverse=True)
            places, shape = nth * T + rows % T, (len(row), T)
            logprobs = logprobs.new_zeros(len(row) * T).index_copy(0, places, logprobs)
            of = lambda x: x[row]  # noqa: E731
        else:
            places, shape = slice(None), (1, len(rows))
            of = lambda x: x.reshape(-1)[rows]  # noqa: E731
        by_logprobs = torch.ops.rlhf_fast.ppo_loss(
            logprobs.view(shape), of(old).view(shape), of(A_BT).view(shape), of(mask).view(shape),
            None if ref is None else of(ref).view(shape), None, one, *terms, 0.0, "constant", True, False,
        )[2].view(-1)[places]  # fmt: skip
        return by_logprobs * weights[rows], -entropy_coef * weights[rows] if entropy_coef else None

    packs = pack_rows(head.rows, B, T, head.chunk_rows) if terms.by_sequence else None
    logprobs, entropy = (x.view(token_ids.shape) for x in loss_in_forward(head, packs, coefficients))
    loss, stats, _, _ = torch.ops.rlhf_fast.ppo_loss(
        logprobs, old, A, mask, ref, entropy, normalizer, *terms, entropy_coef, reduction, False, False,
    )  # fmt: skip
    return loss, stats, logprobs, entropy, *head.gradients()


@torch.library.register_fake("rlhf_fast::linear_ppo_loss", lib=LIBRARY)
def _ppo_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype = compute_dtype(hidden, weight, bias)
    shapes = (), (8,), token_ids.shape, token_ids.shape
    return (
        *(hidden.new_empty(shape, dtype=dtype) for shape in shapes),
        *empty_gradients(hidden, weight, bias, args[-3:], True),
    )


register_consumed_gradients("linear_ppo_loss", "hidden", "weight", "bias")


@kernel("linear_dpo_loss", "cpu", "triton", "cuda")
@full_precision
def _dpo(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    mean_length: Tensor | None,
    normalizer: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, ...]:
    options = PairOptions(*arguments[:5])
    head = head_of(hidden, weight, bias, token_ids, arguments[5:])
    B, T = token_ids.shape[0] // 2, token_ids.shape[1]
    constants = PairConstants(ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, mean_length).to(head.dtype)
    whole = max(B, 1) if normalizer is None else float(normalizer)

    def losses_of(logps_2B: Tensor, pairs: slice, with_grad: bool) -> tuple[Tensor, ...]:
        chosen, rejected = (x[pairs] for x in logps_2B.chunk(2))
        return mixture(torch.ops.rlhf_fast.dpo_loss, chosen, rejected, constants.of(pairs), options, with_grad)

    def coefficients(rows: Tensor, logprobs: Tensor, entropy: Tensor) -> tuple[Tensor, None]:
        sequence = rows // T
        logps_2B = logprobs.new_zeros(2 * B).index_add(0, sequence, logprobs)
        pair = sequence % B
        pairs = slice(int(pair.min()), int(pair.max()) + 1)
        by_chosen, by_rejected = losses_of(logps_2B, pairs, True)[3:]
        by_logps_2B = torch.zeros_like(logps_2B)
        by_logps_2B[pairs], by_logps_2B[B:][pairs] = by_chosen / whole, by_rejected / whole
        return by_logps_2B[sequence], None

    logprobs, _ = loss_in_forward(head, pack_rows(head.rows, B, T, head.chunk_rows), coefficients)
    logps_2B = logprobs.view(2 * B, T).sum(1)
    losses, chosen_rewards, rejected_rewards, _, _ = losses_of(logps_2B, slice(None), False)
    return losses.sum() / whole, losses, chosen_rewards, rejected_rewards, logps_2B, *head.gradients()


@torch.library.register_fake("rlhf_fast::linear_dpo_loss", lib=LIBRARY)
def _dpo_fake(hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, *args: Any) -> tuple[Tensor, ...]:
    dtype, B = compute_dtype(hidden, weight, bias), token_ids.shape[0] // 2
    shapes = (), (B,), (B,), (B,), (2 * B,)
    return (
        *(hidden.new_empty(shape, dtype=dtype) for shape in shapes),
        *empty_gradients(hidden, weight, bias, args[-3:], True),
    )


register_consumed_gradients("linear_dpo_loss", "hidden", "weight", "bias")
