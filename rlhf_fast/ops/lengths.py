"""What depends on the number of tokens of a response: DAPO's punishment of long responses, VAPO's lambda."""

import torch
from torch import Tensor

from rlhf_fast.ops.checks import NUMBERS, check_dims, check_dtype, check_integer, check_positive, expect


@torch.no_grad()
def soft_overlong_punishment(lengths: Tensor, max_length: int, soft_punish_cache: int) -> Tensor:
    """What a long response adds to its score (DAPO, arXiv 2503.14476, eq. 13); named as in TRL:

        0                                        where length <= max_length - soft_punish_cache
        (max_length - soft_punish_cache - length) / soft_punish_cache     up to max_length
        -1                                       beyond

    Args:
        lengths: [B], numbers of tokens.
        max_length: tokens of the longest response.
        soft_punish_cache: tokens over which the punishment grows, from 1 to max_length.

    Returns:
        [B], float32 (float64 for float64 lengths).

    Raises:
        ValueError: soft_punish_cache outside [1, max_length]; lengths that are not [B].
    """
    _check(lengths)
    check_integer("max_length", max_length, 1, "at least 1 token")
    check_integer("soft_punish_cache", soft_punish_cache, 1, "at least 1 token")
    expect(soft_punish_cache <= max_length, "soft_punish_cache", f"at most max_length={max_length}", soft_punish_cache)
    return ((max_length - soft_punish_cache - _float(lengths)) / soft_punish_cache).clamp(-1.0, 0.0)


@torch.no_grad()
def length_adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """GAE's lambda of each response, 1 - 1 / (alpha length), at least 0 (VAPO, arXiv 2504.05118, eq. 6).

    The coefficients of the temporal differences of a response then sum to about alpha times its length. For example,
    alpha = 0.05 gives 0.8 for 100 tokens, and 0.98 for 1000.

    Args:
        lengths: [B], numbers of tokens.
        alpha: > 0.

    Returns:
        [B], float32 (float64 for float64 lengths); of a response without tokens 0.

    Raises:
        ValueError: alpha <= 0; lengths that are not [B].
    """
    _check(lengths)
    check_positive("alpha", alpha)
    return (1 - 1 / (alpha * _float(lengths).clamp(min=1))).clamp(0.0, 1.0)


def _check(lengths: Tensor) -> None:
    check_dtype("lengths", lengths, NUMBERS)
    check_dims("lengths", lengths, "B")


def _float(lengths: Tensor) -> Tensor:
    return lengths if lengths.dtype == torch.float64 else lengths.float()
