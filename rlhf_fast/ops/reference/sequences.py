"""From log-probs, rewards and values of responses: KL estimates, returns, advantages, policy and value losses."""

import torch
from torch import Tensor

from rlhf_fast.ops.reference.dtypes import at_least_fp32, mean_over
from rlhf_fast.ops.results import GAE, PPOLoss, ValueLoss

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before `exp`, so that one runaway token cannot overflow the loss."""


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference); the names are those of `kl_of_log_ratio`."""
    return kl_of_log_ratio(at_least_fp32(logprobs) - at_least_fp32(ref_logprobs), estimator)


def kl_of_log_ratio(d: Tensor, estimator: str) -> Tensor:
    """k1 = d, k2 = d^2 / 2, k3 = e^-d - 1 + d, abs = |d|, of d = logprobs - ref_logprobs (Schulman 2020)."""
    if estimator == "k1":
        return d
    if estimator == "k2":
        return d.square() / 2
    if estimator == "k3":
        return torch.expm1(-d) + d
    return d.abs()


@torch.no_grad()
def shape_rewards(
    scores_B: Tensor,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
) -> Tensor:
    """r_t = -kl_coef KL_t, plus the clipped score at the last True place (arXiv 2203.02155, eq. 2)."""
    kl_BT = kl_penalty(logprobs_BT, ref_logprobs_BT, estimator)
    score_B = at_least_fp32(scores_B)
    if clip is not None:
        score_B = score_B.clamp(-clip, clip)
    is_last_BT = mask_BT & (count_from_end(mask_BT) == 1)
    return torch.where(mask_BT, -kl_coef * kl_BT, 0.0) + torch.where(is_last_BT, score_B[:, None], 0.0)


def count_from_end(mask_BT: Tensor) -> Tensor:
    """L - t: 1 at the row's last True place, L at its first."""
    return mask_BT.flip(-1).cumsum(-1).flip(-1)


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> GAE:
    """A_t = delta_t + gamma lam A_{t+1} from the last True place back (arXiv 1506.02438, eq. 16)."""
    r, v = at_least_fp32(rewards_BT), at_least_fp32(values_BT)
    advantages = torch.zeros_like(r)
    next_value = next_advantage = r.new_zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        counts = mask_BT[:, t]
        delta = r[:, t] + gamma * next_value - v[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(counts, advantage, 0.0)
        next_advantage = torch.where(counts, advantage, next_advantage)
        next_value = torch.where(counts, v[:, t], next_value)
    return GAE(advantages, torch.where(mask_BT, advantages + v, 0.0))


@torch.no_grad()
def discounted_returns(rewards_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} from the last True place back."""
    r = at_least_fp32(rewards_BT)
    returns = torch.zeros_like(r)
    running = r.new_zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        running = torch.where(mask_BT[:, t], r[:, t] + gamma * running, running)
        returns[:, t] = torch.where(mask_BT[:, t], running, 0.0)
    return returns


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the True places, the variance unbiased."""
    x = torch.where(mask, at_least_fp32(x), 0.0)
    n = mask.sum()
    mean = x.sum() / n.clamp(min=1)
    variance = torch.where(mask, (x - mean).square(), 0.0).sum() / (n - 1).clamp(min=1)
    white = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0)


@torch.no_grad()
def remax_returns(
    scores_B: Tensor,
    greedy_scores_B: Tensor,
    logprobs_BT: Tensor,
    ref_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    clip: float | None = None,
    variant: str = "official",
) -> Tensor:
    """The weights of `rlhf_fast.ops.remax_returns`, variant by variant (arXiv 2310.10505)."""
    advantage_B = at_least_fp32(scores_B) - at_least_fp32(greedy_scores_B)
    if clip is not None:
        advantage_B = advantage_B.clamp(-clip, clip)
    kl_BT = torch.where(mask_BT, kl_penalty(logprobs_BT, ref_logprobs_BT), 0.0)
    advantage_BT = advantage_B[:, None].expand_as(kl_BT)
    if variant == "official":
        advantage_BT = gamma ** count_from_end(mask_BT).to(kl_BT) * advantage_BT
    elif variant == "verl":
        kl_BT = kl_BT.flip(-1).cumsum(-1).flip(-1)
    return torch.where(mask_BT, advantage_BT - kl_coef * kl_BT, 0.0)


@torch.no_grad()
def rloo_advantages(scores_B: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of the others in its group (arXiv 2402.14740, section 2.3)."""
    groups = at_least_fp32(scores_B).view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


@torch.no_grad()
def grpo_advantages(scores_B: Tensor, group_size: int) -> Tensor:
    """(score - mean) / (std + 1e-4) within each group (arXiv 2402.03300, section 4.1.2)."""
    groups = at_least_fp32(scores_B).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + 1e-4)).view(-1)


def reduce_tokens(x_BT: Tensor, mask_BT: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The sum over the True places, over the denominator that the reduction names."""
    x_BT = torch.where(mask_BT, x_BT, 0.0)
    if reduction == "sequence_mean":
        x_BT = x_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = max(mask_BT.shape[0], 1) if reduction.startswith("sequence") else mask_BT.sum().clamp(min=1)
    return mean_over(x_BT, normalizer)


def clamped_log_ratio(logprobs: Tensor, other_logprobs: Tensor, mask: Tensor) -> Tensor:
    """logprobs - other_logprobs within +-20, and 0 at masked places before any arithmetic."""
    a, b = (torch.where(mask, at_least_fp32(x), 0.0) for x in (logprobs, other_logprobs))
    return (a - b).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def ppo_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> PPOLoss:
    """max(-A r, -A clamp(r, 1 - low, 1 + high)), reduced, with its bonus terms (arXiv 1707.06347, eq. 7)."""
    low, high = clip if isinstance(clip, tuple) else (clip, clip)
    A_BT = at_least_fp32(advantages).detach()
    A_BT = torch.where(mask_BT, A_BT if A_BT.dim() == 2 else A_BT[:, None], 0.0)
    log_ratio_BT = clamped_log_ratio(logprobs_BT, old_logprobs_BT.detach(), mask_BT)
    ratio_BT = torch.exp(log_ratio_BT)
    unclipped_BT, clipped_BT = -A_BT * ratio_BT, -A_BT * ratio_BT.clamp(1 - low, 1 + high)
    loss_BT = torch.maximum(unclipped_BT, clipped_BT)
    if dual_clip is not None:
        loss_BT = torch.where(A_BT < 0, torch.minimum(loss_BT, -dual_clip * A_BT), loss_BT)

    def reduced(x_BT: Tensor) -> Tensor:
        return reduce_tokens(x_BT, mask_BT, reduction, normalizer)

    policy_loss = reduced(loss_BT)
    kl = entropy_bonus = torch.zeros_like(policy_loss)
    if ref_logprobs is not None:
        kl = reduced(kl_of_log_ratio(clamped_log_ratio(logprobs_BT, ref_logprobs.detach(), mask_BT), kl_estimator))
    if entropy is not None:
        entropy_bonus = reduced(at_least_fp32(entropy))
    loss = policy_loss + kl_coef * kl - entropy_coef * entropy_bonus

    with torch.no_grad():
        n = mask_BT.sum().clamp(min=1)
        ratio_0_BT = torch.where(mask_BT, ratio_BT, 0.0)
        k3_BT = torch.expm1(log_ratio_BT) - log_ratio_BT
        return PPOLoss(
            loss,
            clip_fraction=mean_over((clipped_BT > unclipped_BT).to(loss), n),
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
