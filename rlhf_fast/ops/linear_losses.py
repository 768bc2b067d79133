"""SFT, REINFORCE, PPO and DPO losses straight from hidden states, the gradient taken in the forward pass.

The gradient by a token's logits is a function of these logits times one coefficient, and each of these losses knows the
coefficient once it knows the log-probs of the token (or of the pair). So a chunk's gradient is computed while its
logits are there, and the backward pass only multiplies it by the upstream gradient. Masked places reach no matmul. A
denominator counts the whole batch, or is passed in; it never counts a chunk.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.ops import (
    linear_ops,  # noqa: F401  the operators
    reference,
)
from rlhf_fast.ops.checks import INTEGERS, check_dims, check_dtype, check_like, check_mask, check_number, expect
from rlhf_fast.ops.dispatch import has_kernel
from rlhf_fast.ops.linear import check_head, wants_gradients
from rlhf_fast.ops.pair_options import check_dpo_arguments, loss_names
from rlhf_fast.ops.policy_options import (
    SAPO_TEMPERATURE,
    as_tensor,
    check_normalizer,
    check_ppo_options,
    check_tokens,
)
from rlhf_fast.ops.reference import IGNORED_ID, compute_dtype
from rlhf_fast.ops.results import LinearDPOLoss, LinearLoss, LinearPPOLoss, PPOLoss


def linear_sft_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    normalizer: float | Tensor | None = None,
    memory_budget: int | None = None,
) -> LinearLoss:
    """Negative log-likelihood of tokens from hidden states: loss = -sum of log p(token) / number of counted tokens.

    Plain PyTorch: ``cross_entropy((hidden @ weight.t() + bias).float(), token_ids)``. Like all of these losses it
    computes its gradient in the forward pass and hands it over in the backward pass; a second one is an error.

    Args:
        hidden, weight, token_ids, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients
            flow to hidden, weight and bias.
        normalizer: replaces the number of counted tokens; a 0-dim tensor may change without recompiling.

    Returns:
        LinearLoss(loss, logprobs, entropy): the loss 0-dim, the others [...], detached, 0 where masked; float32
        (float64 if an input is).

    Raises:
        ValueError: as `linear_token_logprobs`; normalizer <= 0.
    """
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    check_normalizer(normalizer, hidden)
    mask = token_ids != IGNORED_ID
    if normalizer is None:
        normalizer = mask.sum()
    if not has_kernel("linear_weighted_loss", hidden):
        out = reference.linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap
        )
        return LinearLoss(reference.mean_over(-out.logprobs, normalizer), *(x.detach() for x in out))
    return _weighted(hidden, weight, bias, token_ids, -linear_ops.over(mask, normalizer), temperature, softcap, budget)


def linear_reinforce_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> LinearLoss:
    """`reinforce_loss` of `linear_token_logprobs`: REINFORCE, ReMax, RLOO from hidden states.

    Args:
        hidden: [B, T, H]; token_ids: [B, T], anything where the mask is False.
        advantages, mask, reduction, normalizer: as in `reinforce_loss`.
        weight, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients flow to hidden,
            weight and bias.

    Returns:
        LinearLoss(loss, logprobs, entropy), as `linear_sft_loss`.

    Raises:
        ValueError: as `linear_token_logprobs` and `reinforce_loss`.
    """
    ids = _masked(token_ids, mask)
    budget = check_head(hidden, weight, bias, ids, temperature, softcap, memory_budget)
    check_tokens("token_ids", token_ids, advantages, mask, reduction, normalizer)
    if not has_kernel("linear_weighted_loss", hidden):
        out = reference.linear_token_logprobs(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap)
        loss = reference.reinforce_loss(out.logprobs, advantages, mask, reduction=reduction, normalizer=normalizer)
        return LinearLoss(loss, *(x.detach() for x in out))
    each = advantages if advantages.dim() == 2 else advantages.unsqueeze(1)
    weights = torch.where(mask, -each * linear_ops.token_weights(mask, reduction, normalizer), 0.0)
    return _weighted(hidden, weight, bias, ids, weights, temperature, softcap, budget)


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    objective: str = "clip",
    importance_sampling_level: str = "token",
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    sapo_temperature: tuple[float, float] = SAPO_TEMPERATURE,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy_coef: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> LinearPPOLoss:
    """`ppo_loss` of `linear_token_logprobs`: the objectives of PPO, GSPO, CISPO and SAPO from hidden states.

    A ratio of whole rows needs whole rows in a chunk. Only a row too long for the memory budget has its logits computed
    twice then.

    Args:
        hidden: [B, T, H]; token_ids: [B, T], anything where the mask is False.
        old_logprobs, advantages, mask, objective, importance_sampling_level, clip, dual_clip, sapo_temperature,
            ref_logprobs, kl_coef, kl_estimator, use_bias_correction_kl, entropy_coef, reduction, normalizer: as in
            `ppo_loss`; the entropy is this policy's own.
        weight, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients flow to hidden,
            weight and bias.

    Returns:
        LinearPPOLoss: the fields of PPOLoss, then logprobs and token_entropy [B, T], detached, 0 where masked.

    Raises:
        ValueError: as `linear_token_logprobs` and `ppo_loss`.
    """
    ids = _masked(token_ids, mask)
    budget = check_head(hidden, weight, bias, ids, temperature, softcap, memory_budget)
    options = check_ppo_options(
        objective, importance_sampling_level, clip, dual_clip, sapo_temperature, ref_logprobs, kl_coef, kl_estimator,
        use_bias_correction_kl, advantages,
    )  # fmt: skip
    check_number("entropy_coef", entropy_coef)
    check_like("old_logprobs", old_logprobs, "token_ids", token_ids)
    if ref_logprobs is not None:
        check_like("ref_logprobs", ref_logprobs, "token_ids", token_ids)
    check_tokens("token_ids", token_ids, advantages, mask, reduction, normalizer)
    if not has_kernel("linear_ppo_loss", hidden):
        out = reference.linear_token_logprobs(hidden, weight, ids, bias=bias, temperature=temperature, softcap=softcap)
        loss = reference.ppo_loss(
            out.logprobs, old_logprobs, advantages, mask, objective=objective,
            importance_sampling_level=importance_sampling_level, clip=clip, dual_clip=dual_clip,
            sapo_temperature=sapo_temperature, ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator,
            use_bias_correction_kl=use_bias_correction_kl, entropy=out.entropy, entropy_coef=entropy_coef,
            reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
        return LinearPPOLoss(*loss, *(x.detach() for x in out))
    loss, stats, logprobs, entropy, _, _, _ = torch.ops.rlhf_fast.linear_ppo_loss(
        hidden, weight, bias, ids, old_logprobs, advantages, mask, ref_logprobs, as_tensor(normalizer), *options,
        entropy_coef, reduction, temperature, softcap or 0.0, budget, *wants_gradients(hidden, weight, bias),
    )  # fmt: skip
    return LinearPPOLoss(*PPOLoss.of(loss, stats), logprobs, entropy)


def linear_dpo_loss(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str | Sequence[str] = "sigmoid",
    loss_weights: Sequence[float] | None = None,
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    mean_chosen_length: float | Tensor | None = None,
    simpo_gamma: float = 0.5,
    cpo_alpha: float = 1.0,
    reference_free: bool = False,
    normalizer: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
) -> LinearDPOLoss:
    """`dpo_loss` of the summed `linear_token_logprobs` of both answers, averaged: DPO from hidden states.

    Both answers of a pair share a chunk, so that the pair's coefficient is known while its logits are there. Only a
    pair too long for the memory budget has its logits computed twice.

    Args:
        hidden: [2B, T, H], the B chosen answers and then the B rejected ones.
        token_ids: [2B, T], -100 where nothing counts (prompt, padding).
        ref_chosen_logps, ref_rejected_logps, beta, loss_type, loss_weights, label_smoothing, chosen_lengths,
            rejected_lengths, mean_chosen_length, simpo_gamma, cpo_alpha, reference_free: as in `dpo_loss`; all losses
            but ipo count the answers' tokens themselves where no lengths are given.
        normalizer: replaces the number of pairs B.
        weight, bias, temperature, softcap, memory_budget: as in `linear_token_logprobs`; gradients flow to hidden,
            weight and bias.

    Returns:
        LinearDPOLoss(loss, losses, chosen_rewards, rejected_rewards, chosen_logps, rejected_logps): loss is
        sum(losses) / B; the others [B] and detached.

    Raises:
        ValueError: as `linear_token_logprobs` and `dpo_loss`; an odd number of rows.
    """
    check_dims("token_ids", token_ids, "BT")
    expect(len(token_ids) % 2 == 0, "token_ids", "an even number of rows, chosen then rejected", list(token_ids.shape))
    budget = check_head(hidden, weight, bias, token_ids, temperature, softcap, memory_budget)
    check_normalizer(normalizer, hidden)
    names = loss_names(loss_type)
    if chosen_lengths is None and rejected_lengths is None and "ipo" not in names:
        chosen_lengths, rejected_lengths = (token_ids != IGNORED_ID).sum(1).chunk(2)
    if mean_chosen_length is None and not {"sft", "cpo", "orpo"}.isdisjoint(names):
        pairs = max(len(token_ids) // 2, 1)
        mean_chosen_length = (token_ids[: len(token_ids) // 2] != IGNORED_ID).sum().double() / pairs
    like = hidden.new_empty(len(token_ids) // 2, dtype=compute_dtype(hidden, weight, bias))
    options, constants = check_dpo_arguments(
        like, like, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths, beta=beta,
        loss_type=loss_type, loss_weights=loss_weights, label_smoothing=label_smoothing,
        mean_chosen_length=mean_chosen_length, simpo_gamma=simpo_gamma, cpo_alpha=cpo_alpha,
        reference_free=reference_free,
    )  # fmt: skip
    if not has_kernel("linear_dpo_loss", hidden):
        out = reference.linear_token_logprobs(
            hidden, weight, token_ids, bias=bias, temperature=temperature, softcap=softcap
        )
        chosen_logps, rejected_logps = out.logprobs.sum(1).chunk(2)
        losses, chosen, rejected = reference.dpo_loss(chosen_logps, rejected_logps, constants, options)
        loss = reference.mean_over(losses, max(len(losses), 1) if normalizer is None else normalizer)
        logps = chosen_logps.detach(), rejected_logps.detach()
        return LinearDPOLoss(loss, losses.detach(), chosen, rejected, *logps)
    loss, losses, chosen_rewards, rejected_rewards, logps, _, _, _ = torch.ops.rlhf_fast.linear_dpo_loss(
        hidden, weight, bias, token_ids.long(), *constants, as_tensor(normalizer), *options, temperature,
        softcap or 0.0, budget, *wants_gradients(hidden, weight, bias),
    )  # fmt: skip
    return LinearDPOLoss(loss, losses, chosen_rewards, rejected_rewards, *logps.chunk(2))


def _masked(token_ids: Tensor, mask: Tensor) -> Tensor:
    check_dtype("token_ids", token_ids, INTEGERS)
    check_dims("token_ids", token_ids, "BT")
    check_mask(mask, "token_ids", token_ids)
    return torch.where(mask, token_ids.long(), IGNORED_ID)


def _weighted(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor,
    weights: Tensor,
    temperature: float,
    softcap: float | None,
    budget: int,
) -> LinearLoss:
    outputs = torch.ops.rlhf_fast.linear_weighted_loss(
        hidden, weight, bias, token_ids.long(), weights, temperature, softcap or 0.0, budget,
        *wants_gradients(hidden, weight, bias),
    )  # fmt: skip
    return LinearLoss(*outputs[:3])
