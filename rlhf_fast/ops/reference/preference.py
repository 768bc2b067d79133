"""From scores or log-probs of answers, pairs and rankings: reward-model losses, DPO and its relatives, KTO."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.pair_options import PairConstants, PairOptions
from rlhf_fast.ops.reference.dtypes import at_least_fp32
from rlhf_fast.ops.results import DPOLoss, KTOLoss, RankingLoss, RewardLoss

DISCOPOP_TAU = 0.05
CERTAIN = 1e-7
"""An average log-prob above -1e-7 counts as this in ORPO, because the odds of a certain answer are infinite."""


def reward_loss(
    chosen_scores_B: Tensor, rejected_scores_B: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> RewardLoss:
    """-log sigmoid(chosen - rejected - margin), mean over pairs, and the centring term (arXiv 2305.18290, eq. 2)."""
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
    """-log sigmoid(s_i - s_j), mean over all pairs with rank_i < rank_j (arXiv 2203.02155, eq. 1)."""
    scores = at_least_fp32(scores_BK)
    present = ranks_BK >= 0
    better = present[:, :, None] & present[:, None, :] & (ranks_BK[:, :, None] < ranks_BK[:, None, :])
    scores = torch.where(present, scores, 0.0)
    difference = scores[:, :, None] - scores[:, None, :]
    n = better.sum().clamp(min=1)
    loss = torch.where(better, -F.logsigmoid(difference), 0.0).sum() / n
    return RankingLoss(loss, torch.where(better, wins(difference.detach()), 0.0).sum() / n)


def dpo_loss(
    chosen_logps_B: Tensor, rejected_logps_B: Tensor, constants: PairConstants, options: PairOptions
) -> DPOLoss:
    """The weighted sum of the terms' `pair_losses`, and the implicit rewards of the first term."""
    chosen, rejected = at_least_fp32(chosen_logps_B), at_least_fp32(rejected_logps_B)
    losses, rewards = torch.zeros_like(chosen), None
    for term, weight in zip(options.terms, options.weights, strict=True):
        *refs, chosen_lengths, rejected_lengths = constants.of_term(term, chosen)
        c, r = (
            x if ref is None else x - at_least_fp32(ref).detach()
            for x, ref in zip((chosen, rejected), refs, strict=True)
        )
        summed = c, r
        if chosen_lengths is not None and rejected_lengths is not None:
            c, r = c / chosen_lengths.clamp(min=1), r / rejected_lengths.clamp(min=1)
        if rewards is None:
            of = (c, r) if term in ("simpo", "odds_ratio") else summed
            rewards = [options.beta * x.detach() for x in of]
        losses = losses + weight * pair_losses(c, r, options.beta, term, options.smoothing, options.margin)
    assert rewards is not None  # `check_dpo_arguments`: at least one term
    return DPOLoss(losses, *rewards)


def pair_losses(
    chosen: Tensor, rejected: Tensor, beta: float, loss_type: str, smoothing: float, margin: float
) -> Tensor:
    """The loss of each pair from the log-ratios log pi/pi_ref of its two answers, or from their log-probs."""
    h = beta * (chosen - rejected)
    match loss_type:
        case "sigmoid" | "cpo":  # DPO eq. 7; with smoothing the conservative DPO of Mitchell
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
        case "bco_pair":  # Jung et al. 2024
            return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
        case "sft":
            return -chosen
        case "simpo":  # Meng et al. 2024, eq. 6
            h = h - margin
            return -(1 - smoothing) * F.logsigmoid(h) - smoothing * F.logsigmoid(-h)
        case "odds_ratio":  # Hong et al. 2024, eq. 7
            c, r = (x + (x.clamp(max=-CERTAIN) - x).detach() for x in (chosen, rejected))
            return -beta * F.logsigmoid((c - log1mexp(c)) - (r - log1mexp(r)))
    raise ValueError(f"unknown loss_type {loss_type!r}")


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - e^x) for x < 0."""
    near = x > -math.log(2)
    far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(torch.where(near, x, -0.5))), torch.log1p(-torch.exp(far)))


def kto_loss(
    logps_B: Tensor,
    ref_logps_B: Tensor,
    labels_B: Tensor,
    kl: float | Tensor,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """lambda_y - v(x, y) of KTO (arXiv 2402.01306, section 4.1): v = lambda_D s(r - z) or lambda_U s(z - r)."""
    r = beta * (at_least_fp32(logps_B) - at_least_fp32(ref_logps_B).detach())
    z = beta * torch.as_tensor(kl, dtype=r.dtype, device=r.device).detach().clamp(min=0) if loss_type == "kto" else 0.0
    good = desirable_weight * (1 - torch.sigmoid(r - z))
    bad = undesirable_weight * (1 - torch.sigmoid(z - r))
    return KTOLoss(torch.where(labels_B, good, bad), r.detach())
