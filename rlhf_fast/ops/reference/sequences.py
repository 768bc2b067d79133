"""From log-probs, rewards and values of responses: KL estimates, returns, advantages."""

import torch
from torch import Tensor

from rlhf_fast.ops.reference.dtypes import at_least_fp32
from rlhf_fast.ops.results import GAE


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
def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float | Tensor = 0.95
) -> GAE:
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
def grpo_advantages(scores_B: Tensor, group_size: int, *, scale_rewards: str = "group") -> Tensor:
    """(score - mean) / (std + 1e-4) within each group (arXiv 2402.03300, section 4.1.2)."""
    groups = at_least_fp32(scores_B).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    if scale_rewards == "none":
        return centred.view(-1)
    if scale_rewards == "batch":
        return (centred / (groups.std() + 1e-4)).view(-1)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + 1e-4)).view(-1)
