"""Losses of policy and value function: PPO and its relatives, the value loss, REINFORCE, each in one pass.

A pass gives value, gradient and statistics.

Leaves out the sum over micro-batches: pass the global denominator as `normalizer` and add the losses.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import check_floats, check_mask, check_number, expect
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
from rlhf_fast.ops.policy_options import (
    REDUCTIONS,
    SAPO_TEMPERATURE,
    SCHEMA,
    PolicyOptions,
    as_tensor,
    check_normalizer,
    check_ppo_options,
    check_tokens,
    denominator,
)
from rlhf_fast.ops.results import PPOLoss, ValueLoss

define(
    "ppo_loss(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor mask, Tensor? ref_logprobs, "
    f"Tensor? entropy, Tensor? normalizer, {SCHEMA}, float entropy_coef, str reduction, bool with_grad_logprobs, "
    "bool with_grad_entropy) "
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
    objective: str = "clip",
    importance_sampling_level: str = "token",
    clip: float | tuple[float, float] | None = None,
    dual_clip: float | None = None,
    sapo_temperature: tuple[float, float] = SAPO_TEMPERATURE,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    kl_estimator: str = "k3",
    use_bias_correction_kl: bool = False,
    entropy: Tensor | None = None,
    entropy_coef: float = 0.0,
    reduction: str = "token_mean",
    normalizer: float | Tensor | None = None,
) -> PPOLoss:
    """Policy objectives on the ratio of new and old policy, to be minimised. With x = logprobs - old_logprobs:

        r = e^x                                  "token"; PPO, arXiv 1707.06347
            e^(mean of x over the row)           "sequence"; GSPO, arXiv 2507.18071, eq. 7
            the same value; the gradient is that of the token's own x     "sequence_token"; eq. 14

        l = max(-A r, -A clamp(r, 1 - low, 1 + high))       "clip"; arXiv 1707.06347, eq. 7
                                                 where A < 0, with dual_clip c: min(l, -c A)
            -min(r, clip) A logprobs             "cispo", its weight min(r, clip) a constant; arXiv 2506.13585, eq. 4
            -A (4 / tau) sigmoid(tau (r - 1))    "sapo", tau by the sign of A; arXiv 2511.20347, eq. 5

        loss = reduce(l) + kl_coef reduce(KL(logprobs, ref_logprobs)) - entropy_coef reduce(entropy)

    Log-ratios are clamped to +-20 (gradient 0 beyond). dual_clip: arXiv 1912.09729, eq. 5, the `delta` of TRL.
    Separate low and high bounds: DAPO, arXiv 2503.14476, eq. 10. Plain PyTorch: the formulas, 20 or so passes over
    [B, T] and as many temporaries; this is one pass that writes the gradient, which the backward pass scales.

    Args:
        logprobs: [B, T], float32, bfloat16, float16 or float64; gradients flow to it and to `entropy` only.
        old_logprobs, ref_logprobs, entropy: as logprobs.
        advantages: [B, T], or [B] for one per sequence, which "sequence" needs; then "sequence" and "sequence_token"
            have the same loss and gradient.
        mask: [B, T] bool, True = counts. What masked places hold has no effect.
        clip: of "clip" epsilon, or (low, high), by default 0.2; of "cispo" the largest ratio, by default 5 (TRL's
            epsilon_high); "sapo" takes none.
        sapo_temperature: tau of advantages above 0, and of the others.
        kl_estimator: of `kl_penalty`, on logprobs - ref_logprobs.
        use_bias_correction_kl: multiply each KL term by r, through which gradients flow: k1 and k3 then have the
            gradient of the reverse KL, off-policy too (arXiv 2512.02556, eq. 7). Without it the gradient of k2 is
            that of the reverse KL on-policy, k3's is that of the forward KL, and k1's is 0 on average.
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
        the larger, of cispo whose ratio is cut, of sapo 0; approx_kl: mean of (r - 1) - log r; kl and entropy: the
        reduced terms, 0 where not given. An empty mask gives 0.

    Raises:
        ValueError: unknown objective, level, reduction or estimator; clip not in [0, 1) x [0, inf); dual_clip <= 1;
            bounds that the objective has not; "constant" without normalizer; kl_coef without ref_logprobs or
            entropy_coef without entropy; use_bias_correction_kl at another level than "token"; shapes, dtypes or
            devices that do not fit.
    """
    options = check_ppo_options(
        objective, importance_sampling_level, clip, dual_clip, sapo_temperature, ref_logprobs, kl_coef, kl_estimator,
        use_bias_correction_kl, advantages,
    )  # fmt: skip
    check_number("entropy_coef", entropy_coef)
    expect(entropy is not None or entropy_coef == 0, "entropy", "a tensor, as entropy_coef is not 0", None)
    optional = {"ref_logprobs": ref_logprobs, "entropy": entropy}
    check_floats("logprobs", optional=optional, logprobs=logprobs, old_logprobs=old_logprobs)
    check_tokens("logprobs", logprobs, advantages, mask, reduction, normalizer)
    if not has_kernel("ppo_loss", logprobs):
        return reference.ppo_loss(
            logprobs, old_logprobs, advantages, mask, objective=objective,
            importance_sampling_level=importance_sampling_level, clip=clip, dual_clip=dual_clip,
            sapo_temperature=sapo_temperature, ref_logprobs=ref_logprobs, kl_coef=kl_coef, kl_estimator=kl_estimator,
            use_bias_correction_kl=use_bias_correction_kl, entropy=entropy, entropy_coef=entropy_coef,
            reduction=reduction, normalizer=normalizer,
        )  # fmt: skip
    logprobs, old_logprobs, advantages, ref_logprobs, entropy = common_dtype(
        logprobs, old_logprobs, advantages, ref_logprobs, entropy
    )
    grad = torch.is_grad_enabled()
    loss, stats, _, _ = call(
        "ppo_loss", logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy, as_tensor(normalizer), *options,
        entropy_coef, reduction, grad and logprobs.requires_grad,
        grad and entropy is not None and entropy.requires_grad,
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
    return call("reinforce_loss", logprobs, advantages, mask, as_tensor(normalizer), reduction, with_grad)[0]


@kernel("ppo_loss", "cpu")
def _ppo_cpu(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    ref_logprobs: Tensor | None,
    entropy: Tensor | None,
    normalizer: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, old, advantages, mask, ref, entropy = contiguous(
        logprobs, old_logprobs, advantages, mask, ref_logprobs, entropy
    )
    *terms, entropy_coef, reduction, with_grad_logprobs, with_grad_entropy = options
    stats = logprobs.new_empty(8)
    grad_logprobs = logprobs.new_empty(logprobs.shape if with_grad_logprobs else 0)
    grad_entropy = logprobs.new_empty(logprobs.shape if with_grad_entropy else 0)
    _cpu.ppo_loss(
        code(logprobs), logprobs.data_ptr(), old.data_ptr(), advantages.data_ptr(), advantages.dim() == 2,
        mask.data_ptr(), pointer(ref), pointer(entropy), *logprobs.shape, *PolicyOptions(*terms).indices(),
        entropy_coef, REDUCTIONS.index(reduction), denominator(normalizer), pointer(grad_logprobs),
        pointer(grad_entropy), stats.data_ptr(), threads(logprobs),
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
        clip, denominator(normalizer), pointer(grad), stats.data_ptr(), threads(values),
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
        *logprobs.shape, REDUCTIONS.index(reduction), denominator(normalizer), pointer(grad), loss.data_ptr(),
        threads(logprobs),
    )  # fmt: skip
    return loss, grad


@torch.library.register_fake("rlhf_fast::reinforce_loss", lib=LIBRARY)
def reinforce_outputs(logprobs: Tensor, *args: Tensor | str | bool | None) -> tuple[Tensor, Tensor]:
    """The empty results that a kernel fills; a gradient that nobody asks for has no element."""
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape if args[-1] else 0)


register_saved_gradients("reinforce_loss", "logprobs")
