"""The options of the policy losses: checks, and what the kernels take of them."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.checks import (
    check_dims,
    check_flag,
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
from rlhf_fast.ops.kl import ESTIMATORS

# Kernels get the index: the orders are those of the enums in csrc/math.h and of kernels/ppo_loss.py.
REDUCTIONS = ("token_mean", "sequence_mean", "sequence_sum", "constant")
"""The kernels know a reduction by its place here: `Reduction` in csrc/math.h."""
OBJECTIVES = ("clip", "cispo", "sapo")
"""The kernels know an objective by its place here: `Objective` in csrc/math.h."""
LEVELS = ("token", "sequence", "sequence_token")
CLIP, LARGEST_RATIO = 0.2, 5.0
SAPO_TEMPERATURE = (1.0, 1.05)


class PolicyOptions(NamedTuple):
    """The options of `ppo_loss`, in the order of its operator's schema, as every kernel takes them."""

    objective: str
    by_sequence: bool  # the ratio is that of the row
    low: float
    high: float  # cispo: the largest ratio
    dual_clip: float  # 0: none
    tau_pos: float
    tau_neg: float
    kl_coef: float
    kl_estimator: str
    kl_by_ratio: bool

    def indices(self) -> tuple[int | float | bool, ...]:
        """These options with numbers in place of names."""
        objective, *others = self
        *others, estimator, by_ratio = others
        return OBJECTIVES.index(objective), *others, ESTIMATORS.index(estimator), by_ratio  # pyright: ignore[reportReturnType]


SCHEMA = (
    "str objective, bool by_sequence, float clip_low, float clip_high, float dual_clip, float tau_pos, float tau_neg, "
    "float kl_coef, str kl_estimator, bool kl_by_ratio"
)
"""`PolicyOptions` in torch's language of schemas."""


def check_ppo_options(
    objective: str,
    level: str,
    clip: float | tuple[float, float] | None,
    dual_clip: float | None,
    sapo_temperature: tuple[float, float],
    ref_logprobs: Tensor | None,
    kl_coef: float,
    kl_estimator: str,
    use_bias_correction_kl: bool,
    advantages: Tensor,
) -> PolicyOptions:
    """Check the options of `ppo_loss`, of those that concern its terms."""
    check_option("objective", objective, OBJECTIVES)
    check_option("importance_sampling_level", level, LEVELS)
    if level == "sequence" and isinstance(advantages, Tensor):
        expected = 'shape [B] at importance_sampling_level "sequence"; "sequence_token" takes [B, T]'
        expect(advantages.dim() == 1, "advantages", expected, list(advantages.shape))
    low, high = _bounds(objective, clip)
    if dual_clip is not None:
        expect(objective == "clip", "dual_clip", f"None, as {objective} has none", dual_clip)
        check_number("dual_clip", dual_clip, "a number > 1 or None", lambda x: x > 1)
    taus: tuple = tuple(sapo_temperature) if isinstance(sapo_temperature, (tuple, list)) else (sapo_temperature,)
    if len(taus) != 2:
        raise ValueError(f"sapo_temperature: expected two numbers, (positive, negative), got {shown(sapo_temperature)}")
    positive, negative = taus
    for tau in taus:  # e^tau has to be a float32
        check_number("sapo_temperature", tau, "numbers in (0, 80]", lambda x: 0 < x <= 80)
    check_number("kl_coef", kl_coef)
    check_option("kl_estimator", kl_estimator, ESTIMATORS)
    check_flag("use_bias_correction_kl", use_bias_correction_kl)
    expect(ref_logprobs is not None or kl_coef == 0, "ref_logprobs", "a tensor, as kl_coef is not 0", None)
    if use_bias_correction_kl:
        expected = 'False at another importance_sampling_level than "token"'
        expect(level == "token", "use_bias_correction_kl", expected, use_bias_correction_kl)
    return PolicyOptions(
        objective, level != "token", low, high, dual_clip or 0.0, positive, negative, kl_coef, kl_estimator,
        bool(use_bias_correction_kl),
    )  # fmt: skip


def _bounds(objective: str, clip: float | tuple[float, float] | None) -> tuple[float, float]:
    """The bounds (low, high) of the ratio; of cispo (0, the largest ratio)."""
    if objective == "sapo":
        expect(clip is None, "clip", "None, as sapo has no bounds", clip)
        return 0.0, 0.0
    if objective == "cispo":
        clip = LARGEST_RATIO if clip is None else clip
        if isinstance(clip, (tuple, list)):
            raise ValueError(f"clip: expected one number for cispo, the largest ratio, got {shown(clip)}")
        check_number("clip", clip, "a number > 0 for cispo, the largest ratio", lambda x: x > 0)
        return 0.0, clip
    clip = CLIP if clip is None else clip
    bounds = clip if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip: expected one bound or two, (low, high), got {shown(clip)}")
    low, high = bounds
    check_number("clip", low, "bounds that are numbers", lambda x: True)
    check_number("clip", high, "bounds that are numbers", lambda x: True)
    expect(0 <= low < 1 and high >= 0, "clip", "bounds 0 <= low < 1 and high >= 0", clip)
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


def denominator(normalizer: Tensor | None) -> float:
    """The number that the compiled core takes; 0 tells it to count the tokens or rows itself."""
    return 0.0 if normalizer is None else float(normalizer)
