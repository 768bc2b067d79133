"""Losses of reward models on preferences: Bradley-Terry on pairs, and on K-wise rankings."""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    INTEGERS,
    check_device,
    check_dims,
    check_dtype,
    check_floats,
    check_number,
    expect,
)
from rlhf_fast.ops.dispatch import (
    LIBRARY,
    _cpu,
    call,
    code,
    common_dtype,
    contiguous,
    define,
    has_kernel,
    kernel,
    pointer,
    threads,
)
from rlhf_fast.ops.gradients import register_saved_gradients
from rlhf_fast.ops.results import RankingLoss, RewardLoss

define(
    "reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center_coef, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)"
)
define("ranking_loss(Tensor scores, Tensor ranks, bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad_scores)")


def reward_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, margin: Tensor | None = None, center_coef: float = 0.0
) -> RewardLoss:
    """Bradley-Terry loss of a reward model on B pairs (DPO paper, arXiv 2305.18290, eq. 2):

        bt_loss = mean(-log sigmoid(chosen - rejected - margin))
        loss    = bt_loss + center_coef mean((chosen + rejected)^2)

    margin: Llama 2 (arXiv 2307.09288) eq. 2. center_coef: keeps the scores near 0 (arXiv 2312.09244, eq. 2).

    Args:
        chosen_scores, rejected_scores, margin: [B], float32, bfloat16, float16 or float64; margin is a constant.

    Returns:
        RewardLoss(loss, accuracy, margin, bt_loss): 0-dim, float32 (float64 if an input is), all but loss detached.
        accuracy: share of pairs with chosen > rejected, a tie counts one half; margin: mean of chosen - rejected.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; center_coef < 0.
    """
    optional = {"margin": margin}
    check_floats("chosen_scores", optional=optional, chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    check_dims("chosen_scores", chosen_scores, "B")
    check_number("center_coef", center_coef, "a number >= 0", lambda x: 0 <= x < math.inf)
    if not has_kernel("reward_loss", chosen_scores):
        return reference.reward_loss(chosen_scores, rejected_scores, margin=margin, center_coef=center_coef)
    chosen, rejected, margin = common_dtype(chosen_scores, rejected_scores, margin)
    loss, stats, _, _ = call("reward_loss", chosen, rejected, margin, center_coef, any_grad(chosen, rejected))
    return RewardLoss(loss, *stats.unbind()[1:])


def ranking_loss(scores: Tensor, ranks: Tensor) -> RankingLoss:
    """Bradley-Terry loss over all pairs of K ranked answers (InstructGPT, arXiv 2203.02155, eq. 1):

        loss = mean over all rows' pairs (i, j) with rank_i < rank_j of -log sigmoid(s_i - s_j)

    Every pair of the batch weighs the same. Pairs of equal rank are skipped.

    Args:
        scores: [B, K], float32, bfloat16, float16 or float64.
        ranks: [B, K], int64 or int32, 0 best; negative = no answer there (rows with fewer than K).

    Returns:
        RankingLoss(loss, accuracy): 0-dim, float32 (float64 for float64 scores); 0 where there is no pair.
        accuracy: share of pairs scored in their order, a tie counts one half.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_floats("scores", scores=scores)
    check_dims("scores", scores, "BK")
    check_dtype("ranks", ranks, INTEGERS)
    expect(ranks.shape == scores.shape, "ranks", f"shape {list(scores.shape)} as scores", list(ranks.shape))
    check_device("ranks", ranks, "scores", scores)
    if not has_kernel("ranking_loss", scores):
        return reference.ranking_loss(scores, ranks)
    (scores,) = common_dtype(scores)
    loss, stats, _ = call("ranking_loss", scores, ranks.long(), any_grad(scores))
    return RankingLoss(loss, stats[1])


def any_grad(*tensors: Tensor) -> bool:
    """Whether autograd will ask for a gradient by one of the tensors."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


@kernel("reward_loss", "cpu")
def _reward_cpu(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen, rejected, margin = contiguous(chosen, rejected, margin)
    _, stats, grad_chosen, grad_rejected = reward_outputs(chosen, rejected, margin, center_coef, with_grad)
    _cpu.reward_loss(
        code(chosen), chosen.data_ptr(), rejected.data_ptr(), pointer(margin), chosen.shape[0], center_coef,
        pointer(grad_chosen), pointer(grad_rejected), stats.data_ptr(), threads(chosen),
    )  # fmt: skip
    return stats[0].clone(), stats, grad_chosen, grad_rejected


@torch.library.register_fake("rlhf_fast::reward_loss", lib=LIBRARY)
def reward_outputs(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None, center_coef: float, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    shape = chosen.shape if with_grad else 0
    return chosen.new_empty(()), chosen.new_empty(4), chosen.new_empty(shape), chosen.new_empty(shape)


register_saved_gradients("reward_loss", "chosen", "rejected")


@kernel("ranking_loss", "cpu")
def _ranking_cpu(scores: Tensor, ranks: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    scores, ranks = contiguous(scores, ranks)
    _, stats, grad = ranking_outputs(scores, ranks, with_grad)
    _cpu.ranking_loss(
        code(scores), scores.data_ptr(), ranks.data_ptr(), *scores.shape, pointer(grad), stats.data_ptr(),
        threads(scores),
    )  # fmt: skip
    return stats[0].clone(), stats, grad


@torch.library.register_fake("rlhf_fast::ranking_loss", lib=LIBRARY)
def ranking_outputs(scores: Tensor, ranks: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    return scores.new_empty(()), scores.new_empty(2), scores.new_empty(scores.shape if with_grad else 0)


register_saved_gradients("ranking_loss", "scores")
