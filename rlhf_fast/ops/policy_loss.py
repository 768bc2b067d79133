"""Losses of policy and value function: PPO, its value loss, REINFORCE; value, gradient and statistics in one pass.

Leaves out the sum over micro-batches: pass the global denominator as `normalizer` and add the losses.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    check_dims,
    check_floats,
    check_like,
    check_mask,
    check_number,
    check_option,
    check_per_row,
    check_positive,
    check_scalar,
    expect,
    is_readable,
    shown,
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
from rlhf_fast.ops.kl import ESTIMATORS
from rlhf_fast.ops.results import PPOLoss, ValueLoss

# Kernels get the index: the order is that of enum Reduction in csrc/math.h and of kernels/ppo_loss.py.
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
"""The kernels know a reduction by its place here: `Reduction` in csrc/math.h."""

define(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    "Tensor? entropy, Tensor? normalizer, float clip_low, float clip_high, float dual_clip, float kl_coef, "
    "str kl_estimator, float entropy_coef, str reduction, bool with_grad_logprobs, bool with_grad_entropy) "
    "-> (Tensor loss, Tensor stats, Tensor grad_logprobs, Tensor grad_entropy)"
)
define(
    "ppo_value_loss(Tensor values, Tensor old_values, Tensor returns, Tensor mask, Tensor? normalizer, float clip, "
    "bool with_grad) -> (Tensor loss, Tensor stats, Tensor grad_values)"
)
define(
    "reinforce_loss(Tensor logprobs, Tensor advantages, Tensor mask, Tensor? normalizer, str reduction, "
    "bool with_grad) -> (Tensor loss, Tensor grad_logprobs)"
)


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
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
    """Clipped policy objective of PPO (arXiv 1707.06347, eq. 7), to be minimised:

        r = exp(logprobs - old_logprobs)
        l = max(-A r, -A clamp(r, 1 - low, 1 + high))               where A < 0, with dual_clip c: min(l, -c A)
        loss = reduce(l) + kl_coef reduce(KL(logprobs, ref_logprobs)) - entropy_coef reduce(entropy)

    Log-ratios are clamped to +-20 (gradient 0 beyond). dual_clip: arXiv 1912.09729, eq. 5. Separate low and high
    bounds: DAPO, arXiv 2503.14476, eq. 10. Plain PyTorch: the formulas, 20 or so passes over [B, T] and as many
    temporaries; this is one pass that writes the gradient, which the backward pass scales.

    Args:
        logprobs: [B, T], float32, bfloat16, float16 or float64; gradients flow to it and to `entropy` only.
        old_logprobs, ref_logprobs, entropy: as logprobs.
        advantages: [B, T], or [B] for one per sequence.
        mask: [B, T] bool, True = counts. What masked places hold has no effect.
        clip: epsilon, or (low, high).
        kl_estimator: of `kl_penalty`, on logprobs - ref_logprobs.
        reduction: over the True tokens
            "token_mean"     sum / number of True tokens
            "sequence_mean"  mean over the B rows of the row's token mean
            "sequence_sum"   mean over the B rows of the row's sum
            "constant"       sum / normalizer
        normalizer: replaces the denominator (tokens or rows), so that micro-batches and ranks add up to the whole
            batch; a 0-dim tensor may change from call to call without recompiling.

    Returns:
        PPOLoss(loss, clip_fraction, approx_kl, ratio_mean, ratio_max, policy_loss, kl, entropy): 0-dim, float32
        (float64 if an input is), all but loss detached. clip_fraction: share of True tokens whose clipped branch is
        the larger; approx_kl: mean of (r - 1) - log r; kl and entropy: the reduced terms, 0 where not given. An
        empty mask gives 0.

    Raises:
        ValueError: unknown reduction or estimator; clip not in [0, 1) x [0, inf); dual_clip <= 1; "constant" without
            normalizer; kl_coef without ref_logprobs or entropy_coef without entropy; shapes, dtypes or devices that
            do not fit.
    """
    low, high = check_ppo_options(clip, dual_clip, kl_estimator, ref_logprobs, kl_coef)
    check_number("entropy_coef", entropy_coef)
    expect(entropy is not None or entropy_coef == 0, "entropy", "a tensor, as entropy_coef is not 0", None)
    optional = {"ref_logprobs": ref_logprobs, "entropy": entropy}
    check_floats("logprobs", optional=optional, logprobs=logprobs, old_logprobs=old_logprobs)
    check_tokens("logprobs", logprobs, advantages, mask, reduction, normalizer)
    if not has_kernel("ppo_loss", logprobs):
        return reference.ppo_loss(
            logprobs, old_logprobs, advantages, mask, clip=(low, high), dual_clip=dual_clip,
            ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator, entropy=entropy,
            entropy_coef=entropy_coef, reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    logprobs, old_logprobs, advantages, ref_logprobs, entropy = common_dtype(
        logprobs, old_logprobs, advantages, ref_logprobs, entropy
    )
    grad = torch.is_grad_enabled()
    loss, stats, _, _ = call(
        "ppo_loss", logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, as_tensor(normalizer), low, high,
        dual_clip or 0.0, kl_coef, kl_estimator, entropy_coef, reduction,
        grad and logprobs.requires_grad, grad and entropy is not None and entropy.requires_grad,
    )  # fmt: skip
    return PPOLoss.of(loss, stats)


def ppo_value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip: float = 0.2,
    normalizer: float | Tensor | None = None,
) -> ValueLoss:
    """Clipped value loss of PPO ("value function clipping" in arXiv 2005.12729, section 3):

        loss = sum 0.5 max((V - R)^2, (clamp(V, V_old - clip, V_old + clip) - R)^2) / number of True tokens

    Args:
        values, old_values, returns: any one shape, float32, bfloat16, float16 or float64; gradients flow to values
            only.
        mask: of that shape, bool, True = counts.
        clip: > 0; math.inf turns clipping off.
        normalizer: replaces the number of True tokens; a 0-dim tensor may change without recompiling.

    Returns:
        ValueLoss(loss, clip_fraction): 0-dim, float32 (float64 if an input is); clip_fraction is the share of True
        tokens whose clipped square is the larger.

    Raises:
        ValueError: clip <= 0; normalizer <= 0; shapes, dtypes or devices that do not fit.
    """
    check_number("clip", clip, "a number > 0", lambda x: x > 0)
    check_floats("values", values=values, old_values=old_values, returns=returns)
    check_mask(mask, "values", values)
    check_normalizer(normalizer, values)
    if not has_kernel("ppo_value_loss", values):
        return reference.ppo_value_loss(values, old_values, returns, mask, clip=clip, normalizer=normalizer)
    values, old_values, returns = common_dtype(values, old_values, returns)
    loss, stats, _ = call(
        "ppo_value_loss",
        values,
        old_values,
        returns,
        mask,
        as_tensor(normalizer),
        clip,
        torch.is_grad_enabled() and values.requires_grad,
    )
    return ValueLoss(loss, stats[1])


def reinforce_loss(
    logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """loss = reduce(-A logprobs): REINFORCE, ReMax (arXiv 2310.10505, Algorithm 1: reduction="sequence_sum"), RLOO.

    Args:
        logprobs: [B, T], float32, bfloat16, float16 or float64; gradients flow to it only.
        advantages: [B, T], or [B] for one per sequence.
        mask, reduction, normalizer: as in `ppo_loss`.

    Returns:
        The loss, 0-dim, float32 (float64 if an input is).

    Raises:
        ValueError: unknown reduction; "constant" without normalizer; shapes, dtypes or devices that do not fit.
    """
    check_floats("logprobs", logprobs=logprobs)
    check_tokens("logprobs", logprobs, advantages, mask, reduction, normalizer)
    if not has_kernel("reinforce_loss", logprobs):
        return reference.reinforce_loss(logprobs, advantages, mask, reduction=reduction, normalizer=normalizer)
    logprobs, advantages = common_dtype(logprobs, advantages)
    with_grad = torch.is_grad_enabled() and logprobs.requires_grad
    denominator = as_tensor(normalizer)
    return call("reinforce_loss", logprobs, advantages, mask, denominator, reduction, with_grad)[0]


def check_ppo_options(
    clip: float | tuple[float, float],
    dual_clip: float | None,
    kl_estimator: str,
    ref_logprobs: Tensor | None,
    kl_coef: float,
) -> tuple[float, float]:
    """Check the options of PPO's objective; returns the bounds (low, high)."""
    bounds = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip: expected one bound or two, (low, high), got {shown(clip)}")
    low, high = bounds
    check_number("clip", low, "bounds that are numbers", lambda x: True)
    check_number("clip", high, "bounds that are numbers", lambda x: True)
    expect(0 <= low < 1 and high >= 0, "clip", "bounds 0 <= low < 1 and high >= 0", clip)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, "a number > 1 or None", lambda x: x > 1)
    check_number("kl_coef", kl_coef)
    check_option("kl_estimator", kl_estimator, ESTIMATORS)
    expect(ref_logprobs is not None or kl_coef == 0, "ref_logprobs", "a tensor, as kl_coef is not 0", None)
    return low, high


def check_tokens(
    first: str, like: Tensor, advantages: Tensor, mask: Tensor, reduction: str, normalizer: float | Tensor | None
) -> None:
    """Check that `like`, the argument named `first`, is [B, T], and that the others fit it."""
    check_dims(first, like, "BT")
    if isinstance(advantages, Tensor) and advantages.dim() == 1:
        check_per_row("advantages", advantages, first, like)
    else:
        check_like("advantages", advantages, first, like)
    check_mask(mask, first, like)
    check_option("reduction", reduction, REDUCTIONS)
    expect(
        reduction != "constant" or normalizer is not None, "normalizer", 'a number, as reduction is "constant"', None
    )
    check_normalizer(normalizer, like)


def check_normalizer(normalizer: float | Tensor | None, like: Tensor) -> None:
    """A number > 0, a 0-dim tensor >= 0 on the CPU or the device of `like`, or None."""
    if isinstance(normalizer, Tensor):
        check_scalar("normalizer", normalizer, like)
        if is_readable(normalizer):  # 0: a count of tokens, where none counts
            got = normalizer.item()
            expect(0 <= got < math.inf, "normalizer", "a finite number >= 0 in a tensor", got)
    elif normalizer is not None:
        check_positive("normalizer", normalizer)


def as_tensor(normalizer: float | Tensor | None) -> Tensor | None:
    """The normalizer as a tensor, whose value torch.compile takes for data; a new Python number would compile anew."""
    if normalizer is None or isinstance(normalizer, Tensor):
        return normalizer
    return (
        torch.ones((), dtype=torch.float64, device="cpu") * normalizer
    )  # torch.tensor(number) would be a constant of the graph


def _denominator(normalizer: Tensor | None) -> float:
    """The number that the compiled core takes; 0 tells it to count the tokens or rows itself."""
    return 0.0 if normalizer is None else float(normalizer)


@kernel("ppo_loss", "cpu")
def _ppo_cpu(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    clip_low: float,
    clip_high: float,
    dual_clip: float,
    kl_coef: float,
    kl_estimator: str,
    entropy_coef: float,
    reduction: str,
    with_grad_logprobs: bool,
    with_grad_entropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, old, advantages, mask, ref, entropy = contiguous(
        logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy
    )
    stats = logprobs.new_empty(8)
    grad_logprobs = logprobs.new_empty(logprobs.shape if with_grad_logprobs else 0)
    grad_entropy = logprobs.new_empty(logprobs.shape if with_grad_entropy else 0)
    _cpu.ppo_loss(
        code(logprobs), logprobs.data_ptr(), old.data_ptr(), advantages.data_ptr(), advantages.dim() == 2,
        mask.data_ptr(), pointer(ref), pointer(entropy), *logprobs.shape, clip_low, clip_high, dual_clip, kl_coef,
        ESTIMATORS.index(kl_estimator), entropy_coef, REDUCTIONS.index(reduction), _denominator(normalizer),
        pointer(grad_logprobs), pointer(grad_entropy), stats.data_ptr(), threads(logprobs),
    )  # fmt: skip
    return stats[0].clone(), stats, grad_logprobs, grad_entropy


@torch.library.register_fake("rlhf_fast::ppo_loss", lib=LIBRARY)
def ppo_outputs(logprobs: Tensor, *args: Tensor | float | str | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    with_grad_logprobs, with_grad_entropy = args[-2:]
    return (
        logprobs.new_empty(()),
        logprobs.new_empty(8),
        logprobs.new_empty(logprobs.shape if with_grad_logprobs else 0),
        logprobs.new_empty(logprobs.shape if with_grad_entropy else 0),
    )


register_saved_gradients("ppo_loss", "logprobs", "entropy")


@kernel("ppo_value_loss", "cpu")
def _value_cpu(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    clip: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    values, old_values, returns, mask = contiguous(values, old_values, returns, mask)
    stats, grad = values.new_empty(2), values.new_empty(values.shape if with_grad else 0)
    _cpu.ppo_value_loss(
        code(values), values.data_ptr(), old_values.data_ptr(), returns.data_ptr(), mask.data_ptr(), values.numel(),
        clip, _denominator(normalizer), pointer(grad), stats.data_ptr(), threads(values),
    )  # fmt: skip
    return stats[0].clone(), stats, grad


@torch.library.register_fake("rlhf_fast::ppo_value_loss", lib=LIBRARY)
def ppo_value_outputs(values: Tensor, *args: Tensor | float | None) -> tuple[Tensor, Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    return values.new_empty(()), values.new_empty(2), values.new_empty(values.shape if args[-1] else 0)


register_saved_gradients("ppo_value_loss", "values")


@kernel("reinforce_loss", "cpu")
def _reinforce_cpu(
    logprobs: Tensor, advantages: Tensor, mask: Tensor, normalizer: Tensor | None, reduction: str, with_grad: bool
) -> tuple[Tensor, Tensor]:
    logprobs, advantages, mask = contiguous(logprobs, advantages, mask)
    loss, grad = logprobs.new_empty(()), logprobs.new_empty(logprobs.shape if with_grad else 0)
    _cpu.reinforce_loss(
        code(logprobs), logprobs.data_ptr(), advantages.data_ptr(), advantages.dim() == 2, mask.data_ptr(),
        *logprobs.shape, REDUCTIONS.index(reduction), _denominator(normalizer), pointer(grad), loss.data_ptr(),
        threads(logprobs),
    )  # fmt: skip
    return loss, grad


@torch.library.register_fake("rlhf_fast::reinforce_loss", lib=LIBRARY)
def reinforce_outputs(logprobs: Tensor, *args: Tensor | str | bool | None) -> tuple[Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape if args[-1] else 0)


register_saved_gradients("reinforce_loss", "logprobs")
