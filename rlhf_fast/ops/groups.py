"""Advantages from groups of answers to one prompt: RLOO and GRPO. Groups are consecutive rows."""

import torch
from torch import Tensor

from rlhf_fast.ops import reference
from rlhf_fast.ops.checks import check_dims, check_floats, check_integer, check_option, expect
from rlhf_fast.ops.dispatch import LIBRARY, _cpu, call, code, common_dtype, define, has_kernel, kernel, threads

define("rloo_advantages(Tensor scores, int group_size) -> Tensor")
define("grpo_advantages(Tensor scores, int group_size) -> Tensor")


@torch.no_grad()
def rloo_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score less the mean of the others in its group (REINFORCE leave-one-out, arXiv 2402.14740, section 2.3).

        A_i = s_i - 1/(k-1) sum_{j != i} s_j

    Args:
        scores: [B], float32, bfloat16, float16 or float64; B a multiple of group_size, groups are consecutive rows.
        group_size: k >= 2.

    Returns:
        Advantages [B], float32 (float64 for float64 input), without gradient.

    Raises:
        ValueError: group_size < 2 or not a divisor of B; scores not [B] or not floating point.
    """
    _check(scores, group_size)
    if not has_kernel("rloo_advantages", scores):
        return reference.rloo_advantages(scores, group_size)
    return call("rloo_advantages", *common_dtype(scores), group_size)


SCALES = ("group", "batch", "none")


@torch.no_grad()
def grpo_advantages(scores: Tensor, group_size: int, *, scale_rewards: str = "group") -> Tensor:
    """Each score less its group's mean, over a standard deviation (GRPO, arXiv 2402.03300, 4.1.2).

        A_i = (s_i - mean) / (std + 1e-4)

    Args:
        scores, group_size: as in `rloo_advantages`.
        scale_rewards: named as in TRL
            "group"  std of the group's scores, unbiased
            "batch"  std of all scores, unbiased (arXiv 2508.08221); of several processes pass all their scores
            "none"   A_i = s_i - mean (Dr. GRPO, arXiv 2503.20783)

    Returns:
        As `rloo_advantages`.

    Raises:
        ValueError: as `rloo_advantages`; an unknown scale_rewards.
    """
    _check(scores, group_size)
    check_option("scale_rewards", scale_rewards, SCALES)
    if scale_rewards != "group" or not has_kernel("grpo_advantages", scores):
        return reference.grpo_advantages(scores, group_size, scale_rewards=scale_rewards)
    return call("grpo_advantages", *common_dtype(scores), group_size)


def _check(scores: Tensor, group_size: int) -> None:
    check_floats("scores", scores=scores)
    check_dims("scores", scores, "B")
    check_integer("group_size", group_size, 2, "at least 2 answers per prompt")
    n = scores.shape[0]
    expect(n % group_size == 0, "group_size", f"a divisor of the number of scores, {n}", group_size)


@kernel("rloo_advantages", "cpu")
def _rloo_cpu(scores: Tensor, group_size: int) -> Tensor:
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    _cpu.rloo_advantages(code(scores), scores.data_ptr(), scores.shape[0], group_size, out.data_ptr(), threads(scores))
    return out


@kernel("grpo_advantages", "cpu")
def _grpo_cpu(scores: Tensor, group_size: int) -> Tensor:
    scores = scores.contiguous()
    out = torch.empty_like(scores)
    _cpu.grpo_advantages(code(scores), scores.data_ptr(), scores.shape[0], group_size, out.data_ptr(), threads(scores))
    return out


@torch.library.register_fake("rlhf_fast::rloo_advantages", lib=LIBRARY)
@torch.library.register_fake("rlhf_fast::grpo_advantages", lib=LIBRARY)
def group_outputs(scores: Tensor, group_size: int) -> Tensor:
    """The empty [B] result, for the fake kernels."""
    return scores.new_empty(scores.shape)
