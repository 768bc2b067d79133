"""Every operation in plain PyTorch: oracle of the tests, fallback where there is no kernel, baseline of the bench.

Bodies read like the formulas and gradients come from autograd. Statistics are float32, or float64 for float64 input.
Arguments are taken as valid (`rlhf_fast.ops` checks them) and memory is not saved: [N, V] temporaries are fine here.

Shapes: B sequences, T response tokens, V vocabulary, N tokens in any leading shape. Masks are bool, True = counts,
and select with `where`, so that whatever sits at a masked place (NaN included) reaches no value or gradient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.results import GAE, DPOLoss, PPOLoss, RankingLoss, RewardLoss, Sample, TokenKL, TokenLogprobs, ValueLoss

IGNORED_ID = -100
"""The token id of a masked place, as in `torch.nn.functional.cross_entropy`."""
MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to +-20 before `exp`, so that one runaway token cannot overflow the loss."""
DISCOPOP_TAU = 0.05


def at_least_fp32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


# Tokens: log-probability, entropy, sampling


def scaled_logits(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = at_least_fp32(logits)
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def token_logprobs(
    logits: Tensor, token_ids: Tensor, *, temperature: float = 1.0, softcap: float | None = None
) -> TokenLogprobs:
    """log p(token) = -softplus(log sum of the others - z_token), which stays non-zero for a confident token."""
    keep = token_ids != IGNORED_ID
    ids = torch.where(keep, token_ids, 0).unsqueeze(-1)
    z = scaled_logits(torch.where(keep.unsqueeze(-1), logits, 0), temperature, softcap)
    c = z - z.detach().amax(-1, keepdim=True)
    e = torch.exp(c)
    s_others = e.scatter(-1, ids, 0.0).sum(-1)
    alone = s_others == 0
    c_target = c.gather(-1, ids).squeeze(-1)
    log_odds = c_target - torch.log(torch.where(alone, 1.0, s_others))
    logprobs = torch.where(alone, 0.0, F.logsigmoid(log_odds))  # F.softplus is linear past 20
    a = (e * torch.where(c == -math.inf, 0.0, c)).sum(-1)
    log_s = torch.log1p(s_others + torch.expm1(c_target))  # keeps what little the others add to a confident token
    entropy = log_s - a / e.sum(-1)
    return TokenLogprobs(torch.where(keep, logprobs, 0.0), torch.where(keep, entropy, 0.0))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenLogprobs:
    logits = linear_logits(hidden, weight, bias, compute_dtype(hidden, weight, bias))
    return token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)


def token_kl(
    logits: Tensor,
    ref_logits: Tensor,
    token_ids: Tensor,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenKL:
    """KL = sum p (log p - log q) over the tokens that p can give; infinite where q cannot give one of them."""
    keep = token_ids != IGNORED_ID
    logits, ref_logits = (at_least_fp32(torch.where(keep.unsqueeze(-1), x, 0)) for x in (logits, ref_logits.detach()))
    log_p, log_q = (F.log_softmax(scaled_logits(x, temperature, softcap), -1) for x in (logits, ref_logits))
    log_ratio = torch.where(log_p > -math.inf, log_p - log_q, 0.0)
    p = log_p.exp().clamp(min=torch.finfo(log_p.dtype).tiny)  # not 0 * infinity where it underflows
    kl = (p * log_ratio).sum(-1).clamp(min=0)
    ref = token_logprobs(ref_logits, token_ids, temperature=temperature, softcap=softcap)
    policy = token_logprobs(logits, token_ids, temperature=temperature, softcap=softcap)
    return TokenKL(*policy, torch.where(keep, kl, 0.0), ref.logprobs)


def linear_token_kl(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    token_ids: Tensor,
    *,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
) -> TokenKL:
    dtype = compute_dtype(hidden, weight, bias, ref_hidden, ref_weight, ref_bias)
    logits = linear_logits(hidden, weight, bias, dtype)
    with torch.no_grad():
        ref_logits = linear_logits(ref_hidden, ref_weight, ref_bias, dtype)
    return token_kl(logits, ref_logits, token_ids, temperature=temperature, softcap=softcap)


@torch.no_grad()
def sample_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, greedy_mask: Tensor | None = None) -> Sample:
    """Inverse CDF: the first token whose running sum of p exceeds the uniform number; or the first maximum."""
    z = scaled_logits(logits, temperature, None)
    e = torch.exp(z - z.amax(-1, keepdim=True)).double()
    below = (e.cumsum(-1) <= (uniforms * e.sum(-1)).unsqueeze(-1)).sum(-1)
    last_possible = e.shape[-1] - 1 - (e > 0).int().flip(-1).argmax(-1)
    tokens = torch.minimum(below, last_possible)
    if greedy_mask is not None:
        tokens = torch.where(greedy_mask, z.argmax(-1), tokens)
    return Sample(tokens, *token_logprobs(logits, tokens, temperature=temperature))


# KL and rewards


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    return kl_of_log_ratio(at_least_fp32(logprobs) - at_least_fp32(ref_logprobs), estimator)


def kl_of_log_ratio(d: Tensor, estimator: str) -> Tensor:
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
    kl_BT = kl_penalty(logprobs_BT, ref_logprobs_BT, estimator)
    score_B = at_least_fp32(scores_B)
    if clip is not None:
        score_B = score_B.clamp(-clip, clip)
    is_last_BT = mask_BT & (count_from_end(mask_BT) == 1)
    return torch.where(mask_BT, -kl_coef * kl_BT, 0.0) + torch.where(is_last_BT, score_B[:, None], 0.0)


def count_from_end(mask_BT: Tensor) -> Tensor:
    """L - t: 1 at the row's last True place, L at its first."""
    return mask_BT.flip(-1).cumsum(-1).flip(-1)


# Returns and advantages


@torch.no_grad()
def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float = 1.0, lam: float = 0.95) -> GAE:
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
    r = at_least_fp32(rewards_BT)
    returns = torch.zeros_like(r)
    running = r.new_zeros(r.shape[0])
    for t in reversed(range(r.shape[1])):
        running = torch.where(mask_BT[:, t], r[:, t] + gamma * running, running)
        returns[:, t] = torch.where(mask_BT[:, t], running, 0.0)
    return returns


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
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
    groups = at_least_fp32(scores_B).view(-1, group_size)
    others = (groups.sum(1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).view(-1)


@torch.no_grad()
def grpo_advantages(scores_B: Tensor, group_size: int) -> Tensor:
    groups = at_least_fp32(scores_B).view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    std = (centred.square().sum(1, keepdim=True) / (group_size - 1)).sqrt()
    return (centred / (std + 1e-4)).view(-1)


# Policy and value losses


def reduce_tokens(x_BT: Tensor, mask_BT: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    x_BT = torch.where(mask_BT, x_BT, 0.0)
    if reduction == "sequence_mean":
        x_BT = x_BT / mask_BT.sum(1, keepdim=True).clamp(min=1)
    if normalizer is None:
        normalizer = max(mask_BT.shape[0], 1) if reduction.startswith("sequence") else mask_BT.sum().clamp(min=1)
    return mean_over(x_BT, normalizer)


def mean_over(x: Tensor, denominator: float | Tensor) -> Tensor:
    """Sum over a denominator, which may be a 0-dim tensor; 0 / 0 is 0: a batch in which nothing counts."""
    if isinstance(denominator, Tensor):
        denominator = denominator.to(x).clamp(min=torch.finfo(x.dtype).tiny)
    return x.sum() / denominator


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
    A_BT = at_least_fp32(advantages).detach()
    A_BT = torch.where(mask_BT, A_BT if A_BT.dim() == 2 else A_BT[:, None], 0.0)
    logprobs_BT = torch.where(mask_BT, at_least_fp32(logprobs_BT), 0.0)
    return reduce_tokens(-A_BT * logprobs_BT, mask_BT, reduction, normalizer)


# Preferences


def reward_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> RewardLoss:
    chosen, rejected = at_least_fp32(chosen_scores_B), at_least_fp32(rejected_scores_B)
    n = max(chosen.shape[0], 1)
    difference = chosen - rejected
    bt_loss = -F.logsigmoid(difference if margin is None else difference - margin).sum() / n
    loss = bt_loss + center_coef * (chosen + rejected).square().sum() / n
    difference = difference.detach()
    return RewardLoss(loss, wins(difference).sum() / n, difference.sum() / n, bt_loss.detach())


def wins(difference: Tensor) -> Tensor:
    """1 for a win, 1/2 for a tie, 0 for a loss."""
    return (difference.sign() + 1) / 2


def ranking_loss(scores_BK: Tensor, ranks_BK: Tensor) -> RankingLoss:
    scores = at_least_fp32(scores_BK)
    present = ranks_BK >= 0
    better = present[:, :, None] & present[:, None, :] & (ranks_BK[:, :, None] < ranks_BK[:, None, :])
    scores = torch.where(present, scores, 0.0)
    difference = scores[:, :, None] - scores[:, None, :]
    n = better.sum().clamp(min=1)
    loss = torch.where(better, -F.logsigmoid(difference), 0.0).sum() / n
    return RankingLoss(loss, torch.where(better, wins(difference.detach()), 0.0).sum() / n)


def dpo_loss(
    chosen_logps_B: Tensor,
    rejected_logps_B: Tensor,
    ref_chosen_logps_B: Tensor | None,
    ref_rejected_logps_B: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reference_free: bool = False,
) -> DPOLoss:
    chosen, rejected = at_least_fp32(chosen_logps_B), at_least_fp32(rejected_logps_B)
    if not reference_free:
        chosen = chosen - at_least_fp32(ref_chosen_logps_B).detach()
        rejected = rejected - at_least_fp32(ref_rejected_logps_B).detach()
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if loss_type in ("ipo", "sigmoid_norm") and chosen_lengths is not None:
        chosen, rejected = chosen / chosen_lengths.clamp(min=1), rejected / rejected_lengths.clamp(min=1)
    return DPOLoss(pair_losses(chosen, rejected, beta, loss_type, label_smoothing), *rewards)


def pair_losses(chosen: Tensor, rejected: Tensor, beta: float, loss_type: str, smoothing: float) -> Tensor:
    """The loss of each pair from the log-ratios log pi/pi_ref of its two answers."""
    h = beta * (chosen - rejected)
    match loss_type:
        case "sigmoid":  # DPO eq. 7; with smoothing the conservative DPO of Mitchell
            return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)
        case "sigmoid_norm":
            return -F.logsigmoid(h)
        case "robust":  # Chowdhury et al. 2024, eq. 12
            return (-(1 - smoothing) * F.logsigmoid(h) + smoothing * F.logsigmoid(-h)) / (1 - 2 * smoothing)
        case "hinge":  # SLiC
            return torch.relu(1 - h)
        case "ipo":  # Azar et al. 2023, eq. 17
            return (chosen - rejected - 1 / (2 * beta)).square()
        case "exo_pair":  # Ji et al. 2024, eq. 16
            log_p, log_q = F.logsigmoid(h), F.logsigmoid(-h)
            return log_p.exp() * (log_p - math.log1p(-smoothing)) + log_q.exp() * (log_q - math.log(smoothing))
        case "nca_pair":  # Chen et al. 2024
            a, b = beta * chosen, beta * rejected
            return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)
        case "apo_zero":  # D'Oosterlinck et al. 2024, eq. 7
            return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)
        case "apo_down":  # D'Oosterlinck et al. 2024, eq. 8
            return torch.sigmoid(beta * chosen) + torch.sigmoid(-h)
        case "sppo_hard":  # Wu et al. 2024, eq. 4.7 with P = 1 and 0
            return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()
        case "discopop":  # Lu et al. 2024, eq. 5
            share = h / DISCOPOP_TAU  # as log-odds; its product with e^-h is taken in logs, where e^-h may overflow
            return -torch.sigmoid(-share) * F.logsigmoid(h) + torch.exp(F.logsigmoid(share) - h)
    raise ValueError(f"unknown loss_type {loss_type!r}")
