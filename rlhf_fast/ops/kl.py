"""KL estimates per token, and the rewards of RLHF made from them.

Leaves out adaptive KL coefficients: they belong to the training loop.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    check_clip,
    check_dims,
    check_floats,
    check_mask,
    check_number,
    check_option,
    check_per_row,
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

# Kernels get the index: the order is that of enum Estimator in csrc/math.h and of kernels/maths.py.
ESTIMATORS = ("k1", "k2", "k3", "abs")
"""The kernels know an estimator by its place here: `Estimator` in csrc/math.h."""

define(
    "kl_penalty(Tensor logprobs, Tensor ref_logprobs, str estimator, bool with_grad) "
    "-> (Tensor kl, Tensor grad_logprobs)"
)
define(
    "shape_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, float kl_coef, str estimator, "
    "float clip) -> Tensor"
)


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str = "k1") -> Tensor:
    """Estimate of KL(policy || reference) at each sampled token, with d = logprobs - ref_logprobs:

        k1 = d      k2 = d^2 / 2      k3 = e^-d - 1 + d      abs = |d|

    k1 and k3 are unbiased, k3 is never negative (J. Schulman, "Approximating KL divergence", 2020). Differentiable
    in both arguments. Plain PyTorch: the formula; this keeps one tensor for the backward pass.

    Args:
        logprobs, ref_logprobs: any one shape, float32, bfloat16, float16 or float64.

    Returns:
        The estimate, of that shape, float32 (float64 for float64 input).

    Raises:
        ValueError: an unknown estimator; shapes, dtypes or devices that do not fit.
    """
    check_option("estimator", estimator, ESTIMATORS)
    check_floats("logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
    if not has_kernel("kl_penalty", logprobs):
        return reference.kl_penalty(logprobs, ref_logprobs, estimator)
    logprobs, ref_logprobs = common_dtype(logprobs, ref_logprobs)
    if ref_logprobs.requires_grad:
        logprobs, ref_logprobs = logprobs - ref_logprobs, torch.zeros_like(ref_logprobs)
    with_grad = torch.is_grad_enabled() and logprobs.requires_grad
    return call("kl_penalty", logprobs, ref_logprobs, estimator, with_grad)[0]


@torch.no_grad()
def shape_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    estimator: str = "k1",
    clip: float | None = None,
) -> Tensor:
    """Per-token rewards: a KL penalty on every True place, and the score on each row's last True place (the EOS).

        r_t = -kl_coef KL_t + [t is the last True place] clamp(score, -clip, clip)

    InstructGPT (arXiv 2203.02155) eq. 2 without the pre-training term; DPO paper (arXiv 2305.18290) section 3. A
    constant: no gradient flows.

    Args:
        scores: [B]; logprobs, ref_logprobs: [B, T]; float32, bfloat16, float16 or float64.
        mask: [B, T] bool, True = a response token; the result is 0 elsewhere.
        estimator: of `kl_penalty`.
        clip: bound on the score, or None.

    Returns:
        Rewards [B, T], float32 (float64 if an input is).

    Raises:
        ValueError: an unknown estimator; clip <= 0; shapes, dtypes or devices that do not fit.
    """
    check_option("estimator", estimator, ESTIMATORS)
    check_clip("clip", clip)
    check_number("kl_coef", kl_coef)
    check_floats("logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_dims("logprobs", logprobs, "BT")
    check_per_row("scores", scores, "logprobs", logprobs)
    check_mask(mask, "logprobs", logprobs)
    if not has_kernel("shape_rewards", logprobs):
        return reference.shape_rewards(
            scores, logprobs, ref_logprobs, mask, kl_coef=kl_coef, estimator=estimator, clip=clip
        )
    tensors = common_dtype(scores, logprobs, ref_logprobs)
    return call("shape_rewards", *tensors, mask, kl_coef, estimator, math.inf if clip is None else clip)


@kernel("kl_penalty", "cpu")
def _kl_cpu(logprobs: Tensor, ref_logprobs: Tensor, estimator: str, with_grad: bool) -> tuple[Tensor, Tensor]:
    logprobs, ref_logprobs = contiguous(logprobs, ref_logprobs)
    kl, grad = kl_penalty_outputs(logprobs, ref_logprobs, estimator, with_grad)
    _cpu.kl_penalty(
        code(logprobs), logprobs.data_ptr(), ref_logprobs.data_ptr(), logprobs.numel(), ESTIMATORS.index(estimator),
        kl.data_ptr(), pointer(grad if with_grad else None), threads(logprobs),
    )  # fmt: skip
    return kl, grad


@torch.library.register_fake("rlhf_fast::kl_penalty", lib=LIBRARY)
def kl_penalty_outputs(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    return logprobs.new_empty(logprobs.shape), logprobs.new_empty(logprobs.shape if with_grad else 0)


register_saved_gradients("kl_penalty", "logprobs")


@kernel("shape_rewards", "cpu")
def _rewards_cpu(
    scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str, clip: float
) -> Tensor:
    scores, logprobs, ref, mask = contiguous(scores, logprobs, ref, mask)
    rewards = torch.empty_like(logprobs)
    _cpu.shape_rewards(
        code(logprobs), scores.data_ptr(), logprobs.data_ptr(), ref.data_ptr(), mask.data_ptr(), *logprobs.shape,
        kl_coef, ESTIMATORS.index(estimator), clip, rewards.data_ptr(), threads(logprobs),
    )  # fmt: skip
    return rewards


@torch.library.register_fake("rlhf_fast::shape_rewards", lib=LIBRARY)
def _rewards_fake(
    scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor, kl_coef: float, estimator: str, clip: float
) -> Tensor:
    return logprobs.new_empty(logprobs.shape)
