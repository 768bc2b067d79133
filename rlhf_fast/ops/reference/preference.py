"""From scores or log-probs of answers, pairs and rankings: reward-model losses, DPO and its relatives, KTO."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.ops.reference.dtypes import at_least_fp32
from rlhf_fast.ops.results import DPOLoss, KTOLoss, RankingLoss, RewardLoss

DISCOPOP_TAU = 0.05


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
    """`pair_losses` of the log-ratios to the reference, and the implicit rewards beta times these."""
    chosen, rejected = at_least_fp32(chosen_logps_B), at_least_fp32(rejected_logps_B)
    if not reference_free:
        assert ref_chosen_logps_B is not None and ref_rejected_logps_B is not None
        chosen = chosen - at_least_fp32(ref_chosen_logps_B).detach()
        rejected = rejected - at_least_fp32(ref_rejected_logps_B).detach()
    rewards = beta * chosen.detach(), beta * rejected.detach()
    if loss_type in ("ipo", "sigmoid_norm") and chosen_lengths is not None:
        assert rejected_lengths is not None  # `check_dpo_arguments`: both or neither
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
