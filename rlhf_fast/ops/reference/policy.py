"""Losses of policy and value function from log-probs, advantages and values of responses."""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops.reference.dtypes import at_least_fp32, mean_over
from rlhf_fast.ops.reference.sequences import kl_of_log_ratio
from rlhf_fast.ops.results import PPOLoss, ValueLoss

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before `exp`, so that one runaway token cannot overflow the loss."""


def reduce_tokens(x_BT: Tensor, mask_BT: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The sum over the True places, over the denominator that the reduction names."""
    x_BT = torch.where(mask_BT, x_BT, 0.0)
    if reduction == "sequence_mean":
        x_BT = x_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = max(mask_BT.shape[0], 1) if reduction.startswith("sequence") else mask_BT.sum().clamp(min=1)
    return mean_over(x_BT, normalizer)


def clamped_log_ratio(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor, level: str = "token") -> Tensor:
    """logprobs - other_logprobs within +-20, and 0 at masked places before any arithmetic.

    level: at "sequence" every token has the mean of its row; at "sequence_token" it has this mean's value, and the
    gradient of its own log-ratio.
    """
    a, b = (torch.where(mask, at_least_fp32(x), 0.0) for x in (logprobs, other_logprobs))
    d = a - b
    if level != "token":
        mean_B1 = d.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        d = mean_B1.expand_as(d) if level == "sequence" else mean_B1.detach() + (d - d.detach())
    return d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    objective: str = "clip",
    importance_sampling_level: str = "token",
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    sapo_temperature: tuple[float, float] = (1.0, 1.05),
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> PPOLoss:
    """The objective's term of each token, reduced, with its bonus terms (arXiv 1707.06347, eq. 7)."""
    A_BT = at_least_fp32(advantages).detach()
    A_BT = torch.where(mask_BT, A_BT if A_BT.dim() == 2 else A_BT[:, None], 0.0)
    log_ratio_BT = clamped_log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT, importance_sampling_level)
    ratio_BT = torch.exp(log_ratio_BT)
    if objective == "cispo":
        largest: Any = 5.0 if clip is None else clip  # one number for cispo
        loss_BT = -A_BT * ratio_BT.detach().clamp(max=largest) * torch.where(mask_BT, at_least_fp32(logprobs_BT), 0.0)
        clipped_BT = ratio_BT > largest
    elif objective == "sapo":
        tau_BT = torch.where(A_BT > 0, *(A_BT.new_tensor(tau) for tau in sapo_temperature))
        loss_BT = -A_BT * 4 / tau_BT * torch.sigmoid(tau_BT * (ratio_BT - 1))
        clipped_BT = torch.zeros_like(mask_BT)
    else:
        low, high = clip if isinstance(clip, tuple) else (0.2, 0.2) if clip is None else (clip, clip)
        unclipped_BT, bounded_BT = -A_BT * ratio_BT, -A_BT * ratio_BT.clamp(1 - low, 1 + high)
        loss_BT, clipped_BT = torch.maximum(unclipped_BT, bounded_BT), bounded_BT > unclipped_BT
        if dual_clip is not None:
            loss_BT = torch.where(A_BT < 0, torch.minimum(loss_BT, -dual_clip * A_BT), loss_BT)

    def reduced(x_BT: Tensor) -> Tensor:
        return reduce_tokens(x_BT, mask_BT, reduction, normalizer)

    policy_loss = reduced(loss_BT)
    kl = entropy_bonus = torch.zeros_like(policy_loss)
    if ref_logprobs is not None:
        kl_BT = kl_of_log_ratio(clamped_log_ratio(logprobs_BT, ref_logprobs.detach(), mask_BT), kl_estimator)
        kl = reduced(kl_BT * ratio_BT if use_bias_correction_kl else kl_BT)
    if entropy is not None:
        entropy_bonus = reduced(at_least_fp32(entropy))
    loss = policy_loss + kl_coef * kl - entropy_coef * entropy_bonus

    with torch.no_grad():
        n = mask_BT.sum().clamp(min=1)
        ratio_0_BT = torch.where(mask_BT, ratio_BT, 0.0)
        k3_BT = torch.where(mask_BT, torch.expm1(log_ratio_BT) - log_ratio_BT, 0.0)
        return PPOLoss(
            loss,
            clip_fraction=mean_over((clipped_BT & mask_BT).to(loss), n),
            approx_kl=mean_over(k3_BT, n),
            ratio_mean=mean_over(ratio_0_BT, n),
            ratio_max=ratio_0_BT.amax() if ratio_0_BT.numel() else policy_loss.detach(),
            policy_loss=policy_loss.detach(),
            kl=kl.detach(),
            entropy=entropy_bonus.detach(),
        )


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """0.5 max((V - R)^2, (V_clipped - R)^2), mean over the True places (arXiv 2005.12729, section 3)."""
    v, v_old, R = (torch.where(mask, at_least_fp32(x), 0.0) for x in (values, old_values.detach(), returns.detach()))
    unclipped = (v - R).square()
    clipped = (v.clamp(v_old - clip, v_old + clip) - R).square()
    n = mask.sum().clamp(min=1)
    loss = mean_over(0.5 * torch.maximum(unclipped, clipped), n if normalizer is None else normalizer)
    return ValueLoss(loss, mean_over((clipped > unclipped).to(v), n))


def reinforce_loss(
    logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """-A log p, reduced (arXiv 2310.10505, Algorithm 1)."""
    A_BT = at_least_fp32(advantages).detach()
    A_BT = torch.where(mask_BT, A_BT if A_BT.dim() == 2 else A_BT[:, None], 0.0)
    logprobs_BT = torch.where(mask_BT, at_least_fp32(logprobs_BT), 0.0)
    return reduce_tokens(-A_BT * logprobs_BT, mask_BT, reduction, normalizer)
