"""Returns and advantages over time: GAE, discounted returns, ReMax's weights, and whitening.

All are constants of the loss: no gradient flows through them.
"""

import math

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import (
    check_clip,
    check_dims,
    check_flag,
    check_floats,
    check_mask,
    check_number,
    check_option,
    check_per_row,
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
from rlhf_fast.ops.results import GAE

# Kernels get the index: the order is that of enum RemaxVariant in csrc/returns.h and of kernels/gae.py.
REMAX_VARIANTS = ("official", "paper", "verl")
"""The kernels know a variant by its place here: `RemaxVariant` in csrc/returns.h."""

define("gae(Tensor rewards, Tensor values, Tensor mask, Tensor? lams, float gamma, float lam) -> (Tensor, Tensor)")
define("discounted_returns(Tensor rewards, Tensor mask, float gamma) -> Tensor")
define("whiten(Tensor x, Tensor mask, bool shift_mean) -> Tensor")
define(
    "remax_returns(Tensor scores, Tensor greedy_scores, Tensor logprobs, Tensor ref_logprobs, Tensor mask, "
    "float kl_coef, float gamma, float clip, str variant) -> Tensor"
)


@torch.no_grad()
def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    value_lam: float | None = None,
) -> GAE:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), over the True places of each row:

        delta_t = r_t + gamma V_{t+1} - V_t      A_t = delta_t + gamma lam A_{t+1}      returns = A + V

    t+1 is the next True place: masked places are skipped over, not taken as zeros, and nothing follows the last one
    (V = A = 0 there). With value_lam the returns are A' + V, where A' has value_lam in place of lam (VAPO, arXiv
    2504.05118, section 4.1: value_lam = 1, and lam of `length_adaptive_lambda`). Plain PyTorch: a loop over T of a
    dozen [B] operations each; this is one pass, or two with value_lam.

    Args:
        rewards, values: [B, T], float32, bfloat16, float16 or float64.
        mask: [B, T] bool; both results are 0 where it is False.
        lam: a number, or [B], floating point, a lambda for each row.
        value_lam: the lambda of the returns; None: lam.

    Returns:
        GAE(advantages, returns), [B, T], float32 (float64 if an input is), without gradient.

    Raises:
        ValueError: gamma, lam or value_lam outside [0, 1]; shapes, dtypes or devices that do not fit.
    """
    _check_fraction("gamma", gamma)
    if value_lam is not None:
        _check_fraction("value_lam", value_lam)
    check_floats("rewards", rewards=rewards, values=values)
    check_dims("rewards", rewards, "BT")
    check_mask(mask, "rewards", rewards)
    if isinstance(lam, Tensor):
        check_per_row("lam", lam, "rewards", rewards)
        if is_readable(lam):
            expect(bool(((lam >= 0) & (lam <= 1)).all()), "lam", "numbers in [0, 1]", shown(lam.tolist()))
    else:
        _check_fraction("lam", lam)
    if value_lam is not None:
        returns = gae(rewards, values, mask, gamma=gamma, lam=value_lam).returns
        return gae(rewards, values, mask, gamma=gamma, lam=lam)._replace(returns=returns)
    if not has_kernel("gae", rewards):
        return reference.gae(rewards, values, mask, gamma=gamma, lam=lam)
    rewards, values, lams = common_dtype(rewards, values, lam if isinstance(lam, Tensor) else None)
    return GAE(*call("gae", rewards, values, mask, lams, gamma, 0.0 if isinstance(lam, Tensor) else lam))


@torch.no_grad()
def discounted_returns(rewards: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Reward to go over the True places of each row, G_t = r_t + gamma G_{t+1}, t+1 the next True place.

    Args:
        rewards: [B, T], float32, bfloat16, float16 or float64.
        mask: [B, T] bool; the result is 0 where it is False.

    Returns:
        Returns [B, T], float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: gamma outside [0, 1]; shapes, dtypes or devices that do not fit.
    """
    _check_fraction("gamma", gamma)
    check_floats("rewards", rewards=rewards)
    check_dims("rewards", rewards, "BT")
    check_mask(mask, "rewards", rewards)
    if not has_kernel("discounted_returns", rewards):
        return reference.discounted_returns(rewards, mask, gamma=gamma)
    return call("discounted_returns", *common_dtype(rewards), mask, gamma)


@torch.no_grad()
def whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """Zero mean and unit variance over the True places: (x - mean) / sqrt(var + 1e-8), var unbiased (n - 1).

    With fewer than two True places the variance counts as 0.

    Args:
        x: any shape, float32, bfloat16, float16 or float64.
        mask: of that shape, bool; the result is 0 where it is False.
        shift_mean: False adds the mean back (rewards keep their level).

    Returns:
        Of the same shape, float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
    """
    check_floats("x", x=x)
    check_mask(mask, "x", x)
    check_flag("shift_mean", shift_mean)
    if not has_kernel("whiten", x):
        return reference.whiten(x, mask, shift_mean=shift_mean)
    return call("whiten", *common_dtype(x), mask, shift_mean)


@torch.no_grad()
def remax_returns(
    scores: Tensor,
    greedy_scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    gamma: float = 1.0,
    clip: float | None = None,
    variant: str = "official",
) -> Tensor:
    """ReMax's weight of each token's log-probability (arXiv 2310.10505): the score less that of the greedy answer.

    With A = clamp(score - greedy_score, -clip, clip), L the row's number of True places, t = 0..L-1 counting them,
    k1 = logprobs - ref_logprobs:

        official    gamma^(L-t) A - kl_coef k1_t             the authors' trainer (clip 5, gamma 0.99, one-step KL)
        paper       A - kl_coef k1_t                         Algorithm 1 with the one-step KL of appendix B
        verl        A - kl_coef sum_{h >= t} k1_h            the full-step KL of appendix B, as verl has it

    Use them as the advantages of `reinforce_loss`.

    Args:
        scores, greedy_scores: [B]; logprobs, ref_logprobs: [B, T]; float32, bfloat16, float16 or float64.
        mask: [B, T] bool; the result is 0 where it is False.
        gamma: used by "official" only.

    Returns:
        Weights [B, T], float32 (float64 if an input is), without gradient.

    Raises:
        ValueError: an unknown variant; gamma outside [0, 1]; clip <= 0; shapes, dtypes or devices that do not fit.
    """
    check_option("variant", variant, REMAX_VARIANTS)
    _check_fraction("gamma", gamma)
    check_clip("clip", clip)
    check_number("kl_coef", kl_coef)
    check_floats("logprobs", logprobs=logprobs, ref_logprobs=ref_logprobs)
    check_dims("logprobs", logprobs, "BT")
    check_per_row("scores", scores, "logprobs", logprobs)
    check_per_row("greedy_scores", greedy_scores, "logprobs", logprobs)
    check_mask(mask, "logprobs", logprobs)
    if not has_kernel("remax_returns", logprobs):
        return reference.remax_returns(
            scores,
            greedy_scores,
            logprobs,
            ref_logprobs,
            mask,
            kl_coef=kl_coef,
            gamma=gamma,
            clip=clip,
            variant=variant,
        )
    tensors = common_dtype(scores, greedy_scores, logprobs, ref_logprobs)
    bound = math.inf if clip is None else clip
    return call("remax_returns", *tensors, mask, kl_coef, gamma, bound, variant)


def _check_fraction(name: str, value: float) -> None:
    check_number(name, value, "a number in [0, 1]", lambda x: 0 <= x <= 1)


@kernel("gae", "cpu")
def _gae_cpu(
    rewards: Tensor, values: Tensor, mask: Tensor, lams: Tensor | None, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    rewards, values, mask, lams = contiguous(rewards, values, mask, lams)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    _cpu.gae(
        code(rewards), rewards.data_ptr(), values.data_ptr(), mask.data_ptr(), pointer(lams), *rewards.shape, gamma,
        lam, advantages.data_ptr(), returns.data_ptr(), threads(rewards),
    )  # fmt: skip
    return advantages, returns


@torch.library.register_fake("rlhf_fast::gae", lib=LIBRARY)
def gae_outputs(rewards: Tensor, *args: Tensor | float | None) -> tuple[Tensor, Tensor]:
    """The empty results that a kernel fills."""
    return rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)


@kernel("discounted_returns", "cpu")
def _discounted_cpu(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    rewards, mask = contiguous(rewards, mask)
    out = torch.empty_like(rewards)
    _cpu.discounted_returns(
        code(rewards), rewards.data_ptr(), mask.data_ptr(), *rewards.shape, gamma, out.data_ptr(),
        threads(rewards),
    )  # fmt: skip
    return out


@torch.library.register_fake("rlhf_fast::discounted_returns", lib=LIBRARY)
def _discounted_fake(rewards: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return rewards.new_empty(rewards.shape)


@kernel("whiten", "cpu")
def _whiten_cpu(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    x, mask = contiguous(x, mask)
    out = torch.empty_like(x)
    _cpu.whiten(
        code(x), x.data_ptr(), mask.data_ptr(), x.numel(), shift_mean, out.data_ptr(), threads(x)
    )  # fmt: skip
    return out


@torch.library.register_fake("rlhf_fast::whiten", lib=LIBRARY)
def _whiten_fake(x: Tensor, mask: Tensor, shift_mean: bool) -> Tensor:
    return x.new_empty(x.shape)


@kernel("remax_returns", "cpu")
def _remax_cpu(
    scores: Tensor,
    greedy_scores: Tensor,
    logprobs: Tensor,
    ref: Tensor,
    mask: Tensor,
    kl_coef: float,
    gamma: float,
    clip: float,
    variant: str,
) -> Tensor:
    scores, greedy_scores, logprobs, ref, mask = contiguous(scores, greedy_scores, logprobs, ref, mask)
    out = torch.empty_like(logprobs)
    _cpu.remax_returns(
        code(logprobs), scores.data_ptr(), greedy_scores.data_ptr(), logprobs.data_ptr(), ref.data_ptr(),
        mask.data_ptr(), *logprobs.shape, kl_coef, gamma, clip, REMAX_VARIANTS.index(variant), out.data_ptr(),
        threads(logprobs),
    )  # fmt: skip
    return out


@torch.library.register_fake("rlhf_fast::remax_returns", lib=LIBRARY)
def _remax_fake(scores: Tensor, greedy_scores: Tensor, logprobs: Tensor, *args: Tensor | float | str) -> Tensor:
    return logprobs.new_empty(logprobs.shape)
