"""KTO: a loss on single answers that somebody found good or bad, where DPO needs pairs of them."""

import math
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    check_dims,
    check_floats,
    check_mask,
    check_number,
    check_option,
    check_positive,
    check_scalar,
    expect,
)
from rlhf_fast.ops.dispatch import LIBRARY, call, common_dtype, define, has_kernel, kernel
from rlhf_fast.ops.gradients import register_saved_gradients
from rlhf_fast.ops.policy_options import as_tensor
from rlhf_fast.ops.results import KTOLoss

KTO_LOSS_TYPES = ("kto", "apo_zero_unpaired")

define(
    "kto_loss(Tensor logps, Tensor ref_logps, Tensor labels, Tensor kl, float beta, str loss_type, "
    "float desirable_weight, float undesirable_weight, bool with_grad) "
    "-> (Tensor losses, Tensor rewards, Tensor grad_logps)"
)


def kto_loss(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: float | Tensor | None,
    *,
    beta: float = 0.1,
    loss_type: str = "kto",
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimisation, per answer, from the summed log-probabilities of its tokens.

    With the reward r = beta (logps - ref_logps), the reference point z = beta max(kl, 0) and s = sigmoid:

        kto                desirable_weight (1 - s(r - z))      of a good answer
                           undesirable_weight (1 - s(z - r))    of a bad answer        arXiv 2402.01306, section 4.1
        apo_zero_unpaired  the same with z = 0                                         arXiv 2408.06266, eq. 7, unpaired

    named and defined as in TRL.

    Args:
        logps: [B], float32, bfloat16, float16 or float64; gradients flow to it only.
        ref_logps: [B], of the same answers under the reference.
        labels: [B] bool, True = a good (desirable) answer.
        kl: estimate of KL(policy || reference), in nats: the mean of logps - ref_logps over answers paired with the
            prompts of other rows (section 4.1 of the paper), of the whole batch, so that micro-batches add up. A number
            or a 0-dim tensor; a constant; a negative estimate counts as 0. None for apo_zero_unpaired.
        beta: > 0.
        desirable_weight, undesirable_weight: >= 0; the paper evens out unequal numbers of good and bad answers by them.

    Returns:
        KTOLoss(losses, rewards): [B], float32 (float64 if an input is); rewards are r, detached.

    Raises:
        ValueError: unknown loss_type; beta <= 0; a negative weight; kl missing or not 0-dim; labels that are not bool;
            shapes, dtypes or devices that do not fit.
    """
    options: dict[str, Any] = dict(
        loss_type=loss_type, desirable_weight=desirable_weight, undesirable_weight=undesirable_weight
    )
    kl = check_kto_arguments(logps, ref_logps, labels, kl, beta=beta, **options)
    if not has_kernel("kto_loss", logps):
        return reference.kto_loss(logps, ref_logps, labels, kl, beta=beta, **options)
    logps, ref_logps = common_dtype(logps, ref_logps)
    with_grad = torch.is_grad_enabled() and logps.requires_grad
    return KTOLoss(*call("kto_loss", logps, ref_logps, labels, as_tensor(kl), beta, *options.values(), with_grad)[:2])


def check_kto_arguments(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: float | Tensor | None,
    *,
    beta: float,
    loss_type: str,
    desirable_weight: float,
    undesirable_weight: float,
) -> float | Tensor:
    """Check the arguments; returns the estimate of the KL, 0 where the loss does not use it."""
    check_option("loss_type", loss_type, KTO_LOSS_TYPES)
    check_positive("beta", beta)
    check_number("desirable_weight", desirable_weight, "a number >= 0", lambda x: 0 <= x < math.inf)
    check_number("undesirable_weight", undesirable_weight, "a number >= 0", lambda x: 0 <= x < math.inf)
    check_floats("logps", logps=logps, ref_logps=ref_logps)
    check_dims("logps", logps, "B")
    check_mask(labels, "logps", logps, "labels")
    if loss_type == "apo_zero_unpaired":
        return 0.0
    expect(kl is not None, "kl", "a number or a 0-dim tensor, as loss_type is kto", None)
    if isinstance(kl, Tensor):
        check_scalar("kl", kl, logps)
    else:
        check_number("kl", kl, "a number or a 0-dim tensor", lambda x: True)
    assert kl is not None  # or `expect` has raised
    return kl


# Plain torch on every back end: for B numbers a call costs more than the arithmetic, so that a kernel saves nothing.
@kernel("kto_loss", "cpu", "triton", "cuda")
def _kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    beta: float,
    loss_type: str,
    desirable_weight: float,
    undesirable_weight: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = beta * (logps - ref_logps)
    gain = rewards - beta * kl.to(logps.dtype).clamp(min=0) if loss_type == "kto" else rewards
    sign = labels.to(logps.dtype) * 2 - 1
    weight = desirable_weight * labels.to(logps.dtype) + undesirable_weight * (~labels).to(logps.dtype)
    losses = weight * torch.sigmoid(-sign * gain)
    grad = -beta * sign * losses * torch.sigmoid(sign * gain) if with_grad else logps.new_empty(0)
    return losses, rewards, grad


@torch.library.register_fake("rlhf_fast::kto_loss", lib=LIBRARY)
def kto_outputs(logps: Tensor, *args: Tensor | float | str) -> tuple[Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    shape = logps.shape
    return logps.new_empty(shape), logps.new_empty(shape), logps.new_empty(shape if args[-1] else 0)


register_saved_gradients("kto_loss", "logps")
