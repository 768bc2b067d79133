# pyright: reportMissingImports=false
# The folder kernels/ is installed as rlhf_fast.kernels, where pyright does not look.
"""The operators on log-probs, rewards and scores on Triton: outputs allocated, kernels launched, nothing waited for.

Imported where there is a GPU build of torch, or Triton's interpreter (TRITON_INTERPRET=1), which takes CPU tensors.
"""

import functools
import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.kernels import dpo_loss as dpo
from rlhf_fast.kernels import gae as recurrences
from rlhf_fast.kernels import kl_penalty as kl
from rlhf_fast.kernels import ppo_loss as policy
from rlhf_fast.kernels import reward_loss as reward
from rlhf_fast.kernels import whiten as normalised
from rlhf_fast.ops.dispatch import contiguous, kernel, on_device
from rlhf_fast.ops.dpo import dpo_outputs
from rlhf_fast.ops.kl import ESTIMATORS, kl_penalty_outputs
from rlhf_fast.ops.pair_options import PAIR_TERMS
from rlhf_fast.ops.policy_loss import ppo_outputs, ppo_value_outputs, reinforce_outputs
from rlhf_fast.ops.policy_options import REDUCTIONS, PolicyOptions
from rlhf_fast.ops.preference import ranking_outputs, reward_outputs
from rlhf_fast.ops.returns import REMAX_VARIANTS


def _of_stream(x: Tensor) -> Tensor:
    """[2] int32 zeros: what the programs of a launch draw, and a count. A launch leaves the first at 0 again, so that
    launches of one stream, which follow one another, can share it; a graph being captured gets its own."""
    if not x.is_cuda:
        return _tickets(x.device, 0)
    if torch.cuda.is_current_stream_capturing():
        return torch.zeros(2, dtype=torch.int32, device=x.device)
    return _tickets(x.device, torch.cuda.current_stream(x.device).cuda_stream)


@functools.cache
def _tickets(device: torch.device, stream: int) -> Tensor:
    return torch.zeros(2, dtype=torch.int32, device=device)


def _partial(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64)


def _present(x: Tensor) -> Tensor | None:
    """None for an empty tensor, which stands for a gradient that nobody asked for."""
    return x if x.numel() else None


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


@kernel("kl_penalty", "triton")
@on_device
def _kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    logprobs, ref_logprobs = contiguous(logprobs, ref_logprobs)
    out, grad = kl_penalty_outputs(logprobs, ref_logprobs, estimator, with_grad)
    kl.kl_penalty(logprobs, ref_logprobs, ESTIMATORS.index(estimator), out, _present(grad))
    return out, grad


@kernel("shape_rewards", "triton")
@on_device
def _shape_rewards(
    scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str, clip: float
) -> Tensor:
    scores, logprobs, ref, mask = contiguous(scores, logprobs, ref, mask)
    rewards = torch.empty_like(logprobs)
    kl.shape_rewards(scores, logprobs, ref, mask, kl_coef, ESTIMATORS.index(estimator), clip, rewards)
    return rewards


@kernel("gae", "triton")
@on_device
def _gae(
    rewards: Tensor, values: Tensor, mask: Tensor, lams: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    rewards, values, mask, lams = contiguous(rewards, values, mask, lams)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    recurrences.gae(rewards, values, mask, lams, gamma, lam, advantages, returns)
    return advantages, returns


@kernel("discounted_returns", "triton")
@on_device
def _discounted_returns(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    rewards, mask = contiguous(rewards, mask)
    out = torch.empty_like(rewards)
    recurrences.discounted_returns(rewards, mask, gamma, out)
    return out


@kernel("remax_returns", "triton")
@on_device
def _remax_returns(
    scores: Tensor,
    greedy_scores: Tensor,
    logprobs: Tensor,
    ref: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    clip: float,
    variant: str,
) -> Tensor:
    scores, greedy_scores, logprobs, ref, mask = contiguous(scores, greedy_scores, logprobs, ref, mask)
    out = torch.empty_like(logprobs)
    recurrences.remax_returns(
        scores, greedy_scores, logprobs, ref, mask, kl_coef, _log(gamma), clip, REMAX_VARIANTS.index(variant), out
    )
    return out


@kernel("whiten", "triton")
@on_device
def _whiten(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    x, mask = contiguous(x, mask)
    out = torch.empty_like(x)
    blocks = -(-x.numel() // normalised.BLOCK)
    normalised.whiten(x, mask, shift_mean, out, _partial(x, 3, blocks), _partial(x, 2), _of_stream(x))
    return out


@kernel("rloo_advantages", "triton")
@on_device
def _rloo(scores: Tensor, group_size: int) -> Tensor:
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    normalised.group_advantages(scores, group_size, False, out)
    return out


@kernel("grpo_advantages", "triton")
@on_device
def _grpo(scores: Tensor, group_size: int) -> Tensor:
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    normalised.group_advantages(scores, group_size, True, out)
    return out


def _normalizer(normalizer: Tensor | None, like: Tensor) -> Tensor | None:
    """The denominator on the device of `like`, sent there without a wait."""
    return None if normalizer is None else normalizer.to(like.device, torch.float64, non_blocking=True)


@kernel("ppo_loss", "triton")
@on_device
def _ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, ...]:
    inputs = contiguous(logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy)
    *terms, entropy_coef, reduction, with_grad_logprobs, with_grad_entropy = options
    terms = PolicyOptions(*terms)
    terms = terms._replace(dual_clip=terms.dual_clip or math.inf).indices()
    outputs = ppo_outputs(logprobs, with_grad_logprobs, with_grad_entropy)
    if logprobs.numel() == 0:
        return tuple(x.zero_() for x in outputs)
    loss, stats, grad_logprobs, grad_entropy = outputs
    policy.ppo_loss(
        *inputs, _normalizer(normalizer, logprobs), *terms, entropy_coef, REDUCTIONS.index(reduction),
        _present(grad_logprobs), _present(grad_entropy), loss, stats,
        _partial(logprobs, policy.PARTIALS, len(logprobs)), _of_stream(logprobs),
        {} if torch.version.hip else policy.REGISTERS,
    )  # fmt: skip
    return outputs


@kernel("ppo_value_loss", "triton")
@on_device
def _ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    clip: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    inputs = contiguous(values, old_values, returns, mask)
    outputs = ppo_value_outputs(values, with_grad)
    if values.numel() == 0:
        return tuple(x.zero_() for x in outputs)
    loss, stats, grad = outputs
    blocks = -(-values.numel() // policy.BLOCK)
    policy.ppo_value_loss(
        *inputs, _normalizer(normalizer, values), clip, _present(grad), loss, stats, _partial(values, 2, blocks),
        _of_stream(values),
    )  # fmt: skip
    return outputs


@kernel("reinforce_loss", "triton")
@on_device
def _reinforce_loss(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, normalizer: Tensor | None, reduction: str, with_grad: bool
) -> tuple[Tensor, ...]:
    inputs = contiguous(logprobs, advantages, mask)
    outputs = reinforce_outputs(logprobs, with_grad)
    if logprobs.numel() == 0:
        return tuple(x.zero_() for x in outputs)
    loss, grad = outputs
    policy.reinforce_loss(
        *inputs, _normalizer(normalizer, logprobs), REDUCTIONS.index(reduction), _present(grad), loss,
        _partial(logprobs, len(logprobs)), _of_stream(logprobs),
    )  # fmt: skip
    return outputs


@kernel("reward_loss", "triton")
@on_device
def _reward_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected, margin = contiguous(chosen, rejected, margin)
    outputs = loss, stats, grad_chosen, grad_rejected = reward_outputs(chosen, rejected, margin, center_coef, with_grad)
    gradients = _present(grad_chosen), _present(grad_rejected)
    reward.reward_loss(chosen, rejected, margin, center_coef, *gradients, loss, stats)
    return outputs


@kernel("ranking_loss", "triton")
@on_device
def _ranking_loss(scores: Tensor, ranks: Tensor, with_grad: bool) -> tuple[Tensor, ...]:
    scores, ranks = contiguous(scores, ranks)
    outputs = loss, stats, grad = ranking_outputs(scores, ranks, with_grad)
    if scores.numel() == 0:
        return tuple(x.zero_() for x in outputs)
    partial = _partial(scores, 2, len(scores))
    reward.ranking_loss(scores, ranks, _present(grad), loss, stats, partial, _of_stream(scores))
    return outputs


@kernel("dpo_loss", "triton")
@on_device
def _dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    margin: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    inputs = contiguous(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    outputs = dpo_outputs(chosen, with_grad)
    losses, chosen_rewards, rejected_rewards, grad_chosen, grad_rejected = outputs
    eps = label_smoothing
    dpo.dpo_loss(
        *inputs, beta, PAIR_TERMS.index(loss_type), eps, _log(eps), _log(1 - eps), margin, losses, chosen_rewards,
        rejected_rewards, _present(grad_chosen), _present(grad_rejected),
    )  # fmt: skip
    return outputs
