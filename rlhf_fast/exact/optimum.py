"""Reward less KL, J(pi) = E_pi[r] - beta KL(pi || ref), and its optimum in closed form (DPO, arXiv 2305.18290, sec. 4).

    pi_r(y|x) = ref(y|x) exp(r(x, y) / beta) / Z(x)        eq. 4, the one maximiser
    J(pi)     = beta log Z - beta KL(pi || pi_r)           hence max J = beta log Z
    r(x, y)   = beta log(pi_r(y|x) / ref(y|x)) + beta log Z(x)        eq. 5

Everything takes log-probabilities and rewards [..., N] over all N completions and is differentiable; completions of
probability 0 (log-probability -inf) contribute 0. Left out: weights of prompts. Every prompt counts alike.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.ops.checks import check_floats, check_positive, expect


class Frontier(NamedTuple):
    """Points of the frontier: no policy has more reward at its KL. Means over all leading axes, one beta for all."""

    beta: Tensor  # [K]
    kl: Tensor  # [K], nats
    reward: Tensor  # [K]


def log_partition(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log Z(x) = log sum_y ref(y|x) exp(r(x, y) / beta), [...]."""
    _check(ref_logprobs, rewards, beta)
    return (ref_logprobs + rewards / beta).logsumexp(-1)


def optimum(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """log pi_r(y|x), [..., N]. As beta falls to 0 it goes to ref on the best completions; as beta grows, to ref."""
    _check(ref_logprobs, rewards, beta)
    return (ref_logprobs + rewards / beta).log_softmax(-1)


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """beta log(pi(y|x) / ref(y|x)), [..., N]: the reward whose optimum is pi, up to a function of x."""
    _check(logprobs, ref_logprobs, beta, "logprobs", "ref_logprobs")
    return beta * (logprobs - ref_logprobs)


def expected_reward(logprobs: Tensor, rewards: Tensor) -> Tensor:
    """E_pi[r], [...]."""
    _check(logprobs, rewards, 1.0, "logprobs")
    return (logprobs.exp() * rewards).sum(-1)


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || ref) = sum_y pi(y) log(pi(y) / ref(y)), [...], nats; inf where pi leaves ref's support."""
    _check(logprobs, ref_logprobs, 1.0, "logprobs", "ref_logprobs")
    possible = logprobs > -math.inf
    log_ratio = torch.where(possible, logprobs, 0.0) - torch.where(possible, ref_logprobs, 0.0)
    return (logprobs.exp() * log_ratio).sum(-1)


def objective(logprobs: Tensor, ref_logprobs: Tensor, rewards: Tensor, beta: float) -> Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || ref), [...]."""
    return expected_reward(logprobs, rewards) - beta * kl(logprobs, ref_logprobs)


def frontier(ref_logprobs: Tensor, rewards: Tensor, betas: Sequence[float]) -> Frontier:
    """KL and reward of the optimum at each beta, means over all leading axes."""
    points = [_point(ref_logprobs, rewards, beta) for beta in betas]
    kls, reward = (torch.stack(column) for column in zip(*points, strict=True))
    return Frontier(torch.tensor(betas, dtype=kls.dtype, device=kls.device), kls, reward)


def beta_at_kl(ref_logprobs: Tensor, rewards: Tensor, target_kl: float) -> float:
    """The beta whose optimum has this mean KL in nats. Bisection finds it, because the KL falls as beta grows.

    Raises:
        ValueError: target_kl not between 0 and the KL of the best completions, -log ref(argmax r).
    """
    _check(ref_logprobs, rewards, 1.0)
    possible = torch.where(ref_logprobs > -math.inf, rewards, -math.inf)
    best = possible == possible.amax(-1, keepdim=True)
    largest = -torch.where(best, ref_logprobs, -math.inf).logsumexp(-1).mean().item()
    expect(
        0 < target_kl < largest, "target_kl", f"between 0 and {largest:.6g}, that of the best completions", target_kl
    )
    spread = (possible.amax(-1) - torch.where(possible > -math.inf, rewards, math.inf).amin(-1)).max().item()
    low, high = (math.log(spread * factor) for factor in (1e-9, 1e9))
    while low < (middle := (low + high) / 2) < high:
        if _point(ref_logprobs, rewards, math.exp(middle))[0] > target_kl:
            low = middle
        else:
            high = middle
    return math.exp(middle)


def _point(ref_logprobs: Tensor, rewards: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    logprobs = optimum(ref_logprobs, rewards, beta)
    return kl(logprobs, ref_logprobs).mean(), expected_reward(logprobs, rewards).mean()


def _check(first: Tensor, second: Tensor, beta: float, name: str = "ref_logprobs", other: str = "rewards") -> None:
    check_floats(name, **{name: first, other: second})  # pyright: ignore[reportArgumentType]
    check_positive("beta", beta)
