"""Losses on preferences: Bradley-Terry reward models, K-wise rankings, and DPO with its relatives."""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    INTEGERS,
    NUMBERS,
    check_device,
    check_dims,
    check_dtype,
    check_flag,
    check_floats,
    check_number,
    check_option,
    check_positive,
    check_tensor,
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
from rlhf_fast.ops.results import DPOLoss, RankingLoss, RewardLoss

# Kernels get the index: the order is that of enum DPOType in csrc/pair_terms.h and of kernels/dpo_loss.py.
LOSS_TYPES = (
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "sppo_hard",
    "discopop",
)
"""The kernels know a loss by its place here: `DPOType` in csrc/pair_terms.h."""

define(
    "reward_loss(Tensor chosen, Tensor rejected, Tensor? margin, float center_coef, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor grad_chosen, Tensor grad_rejected)"
)
define("ranking_loss(Tensor scores, Tensor ranks, bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad_scores)")
define(
    "dpo_loss(Tensor chosen, Tensor rejected, Tensor? ref_chosen, Tensor? ref_rejected, Tensor? chosen_lengths, "
    "Tensor? rejected_lengths, float beta, str loss_type, float label_smoothing, bool with_grad) "
    "-> (Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, Tensor grad_chosen, Tensor grad_rejected)"
)


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
    loss, stats, _, _ = call("reward_loss", chosen, rejected, margin, center_coef, _any_grad(chosen, rejected))
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
    loss, stats, _ = call("ranking_loss", scores, ranks.long(), _any_grad(scores))
    return RankingLoss(loss, stats[1])


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    reference_free: bool = False,
) -> DPOLoss:
    """Direct preference optimisation and relatives, per pair, from the summed log-probabilities of the answers.

    With log-ratios c = chosen_logps - ref_chosen_logps, r likewise for the rejected answer, h = beta (c - r) and
    S = log sigmoid:

        sigmoid       -(1 - e) S(h) - e S(-h), e = label_smoothing (conservative DPO)   arXiv 2305.18290 eq. 7
        robust        (-(1 - e) S(h) + e S(-h)) / (1 - 2e)                              arXiv 2403.00409 eq. 12
        hinge         max(0, 1 - h)                                                     SLiC, arXiv 2305.10425 eq. 3
        ipo           (c - r - 1/(2 beta))^2                                            arXiv 2310.12036 eq. 17
        exo_pair      q (log q - log(1 - e)) + (1 - q) (log(1 - q) - log e), q = sigmoid(h)   arXiv 2402.00856 eq. 16
        nca_pair      -S(beta c) - S(-beta c)/2 - S(-beta r)/2                          arXiv 2402.05369
        apo_zero      1 - sigmoid(beta c) + sigmoid(beta r)                             arXiv 2408.06266 eq. 7
        apo_down      sigmoid(beta c) + 1 - sigmoid(h)                                  arXiv 2408.06266 eq. 8
        sigmoid_norm  -S(h) with c, r divided by the answers' lengths
        sppo_hard     (c - 1/(2 beta))^2 + (r + 1/(2 beta))^2                           arXiv 2405.00675 eq. 4.7
        discopop      -(1 - m) S(h) + m e^-h, m = sigmoid(h / 0.05)                     arXiv 2406.08414 eq. 5

    named and defined as in TRL. Published codes differ on ipo: token sums as in the paper's formula, or (with
    lengths given) averages per token as its authors ran it.

    Args:
        chosen_logps, rejected_logps: [B], float32, bfloat16, float16 or float64; gradients flow to these only.
        ref_chosen_logps, ref_rejected_logps: as these; None if reference_free, which drops the reference.
        beta: > 0.
        label_smoothing: e, the probability that a label is wrong: [0, 1] for sigmoid, [0, 0.5) for robust, (0, 1) for
            exo_pair; of no other loss.
        chosen_lengths, rejected_lengths: [B] token counts; for ipo (optional) and sigmoid_norm (required), else unused.

    Returns:
        DPOLoss(losses, chosen_rewards, rejected_rewards): [B], float32 (float64 if an input is); rewards are beta c
        and beta r before any division by length, detached.

    Raises:
        ValueError: unknown loss_type; label_smoothing out of range or not used by the loss; lengths missing;
            beta <= 0; shapes, dtypes or devices that do not fit.
    """
    (ref_chosen_logps, ref_rejected_logps), (chosen_lengths, rejected_lengths) = check_dpo_arguments(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths, rejected_lengths,
        beta=beta, loss_type=loss_type, label_smoothing=label_smoothing, reference_free=reference_free,
    )  # fmt: skip
    if not has_kernel("dpo_loss", chosen_logps):
        return reference.dpo_loss(
            chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta, loss_type=loss_type,
            label_smoothing=label_smoothing, chosen_lengths=chosen_lengths, rejected_lengths=rejected_lengths,
            reference_free=reference_free,
        )  # fmt: skip
    chosen, rejected, ref_chosen, ref_rejected = common_dtype(
        chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps
    )
    if chosen_lengths is not None and rejected_lengths is not None:
        chosen_lengths, rejected_lengths = chosen_lengths.to(chosen.dtype), rejected_lengths.to(chosen.dtype)
    outputs = call(
        "dpo_loss", chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths, beta, loss_type,
        label_smoothing, _any_grad(chosen, rejected),
    )  # fmt: skip
    return DPOLoss(*outputs[:3])


def check_dpo_arguments(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    *,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    reference_free: bool,
) -> tuple[tuple[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]:
    """Check the arguments; returns the two reference log-probs and the two lengths, None where the loss uses none."""
    check_option("loss_type", loss_type, LOSS_TYPES)
    check_positive("beta", beta)
    check_flag("reference_free", reference_free)
    _check_smoothing(loss_type, label_smoothing)
    if reference_free:
        ref_chosen_logps = ref_rejected_logps = None
    else:
        expect(ref_chosen_logps is not None, "ref_chosen_logps", "a tensor, as reference_free is False", None)
        expect(ref_rejected_logps is not None, "ref_rejected_logps", "a tensor, as reference_free is False", None)
    references = {"ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps}
    check_floats("chosen_logps", optional=references, chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_dims("chosen_logps", chosen_logps, "B")
    if loss_type not in ("ipo", "sigmoid_norm"):
        chosen_lengths = rejected_lengths = None
    _check_lengths(loss_type, chosen_logps, chosen_lengths, rejected_lengths)
    return (ref_chosen_logps, ref_rejected_logps), (chosen_lengths, rejected_lengths)


def _any_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _check_smoothing(loss_type: str, e: float) -> None:
    name = "label_smoothing"
    if loss_type == "robust":
        check_number(name, e, "a number in [0, 0.5) for robust", lambda e: 0 <= e < 0.5)
    elif loss_type == "exo_pair":
        check_number(name, e, "a number in (0, 1) for exo_pair (the paper recommends 1e-3)", lambda e: 0 < e < 1)
    elif loss_type == "sigmoid":
        check_number(name, e, "a number in [0, 1]", lambda e: 0 <= e <= 1)
    else:
        check_number(name, e, f"0, as {loss_type} has none", lambda e: e == 0)


def _check_lengths(loss_type: str, chosen_logps: Tensor, chosen: Tensor | None, rejected: Tensor | None) -> None:
    for name, lengths in (("chosen_lengths", chosen), ("rejected_lengths", rejected)):
        if lengths is None:
            expect(loss_type != "sigmoid_norm", name, "a tensor, as sigmoid_norm divides by it", None)
            continue
        check_tensor(name, lengths)
        expect(lengths.dtype in NUMBERS, name, "a tensor of numbers", lengths.dtype)
        shape = list(chosen_logps.shape)
        expect(list(lengths.shape) == shape, name, f"shape {shape} as chosen_logps", list(lengths.shape))
        check_device(name, lengths, "chosen_logps", chosen_logps)
    missing = "chosen_lengths" if chosen is None else "rejected_lengths"
    expect((chosen is None) == (rejected is None), "chosen_lengths", "both lengths or neither", f"no {missing}")


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


@kernel("dpo_loss", "cpu")
def _dpo_cpu(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor | None,
    ref_rejected: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    beta: float,
    loss_type: str,
    label_smoothing: float,
    with_grad: bool,
) -> tuple[Tensor, ...]:
    inputs = contiguous(chosen, rejected, ref_chosen, ref_rejected, chosen_lengths, rejected_lengths)
    outputs = dpo_outputs(chosen, with_grad)
    _cpu.dpo_loss(
        code(chosen), *map(pointer, inputs), chosen.shape[0], beta, LOSS_TYPES.index(loss_type), label_smoothing,
        *map(pointer, outputs), threads(chosen),
    )  # fmt: skip
    return outputs


@torch.library.register_fake("rlhf_fast::dpo_loss", lib=LIBRARY)
def dpo_outputs(chosen: Tensor, *args: Tensor | float | str | None) -> tuple[Tensor, ...]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    per_pair = [chosen.new_empty(chosen.shape) for _ in range(3)]
    return *per_pair, *(chosen.new_empty(chosen.shape if args[-1] else 0) for _ in range(2))


register_saved_gradients("dpo_loss", "chosen", "rejected")
