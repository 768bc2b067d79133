"""The linear contextual bandit of arXiv 2312.10584: features, rewards, preferences, optimality gaps.

States s are uniform on [0, 1], actions a are 0..3, the true reward is r(s, a) = phi_r(s, a) . (1, 2), a policy is
softmax(phi_pi(s, a) . theta). Everything carries a leading axis of seeds: S seeds, n preferences, M states, A = 4
actions, F = 2 features. A seed's draws do not depend on the other seeds, and those of a smaller n or m open those of a
larger one.

Left out: the published code's order of random numbers; our seeds are other draws from the same distributions.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

Setting = Literal["matched", "mismatched"]
ACTIONS = 4
TRUE_THETA = (1.0, 2.0)
PAIRS = torch.combinations(torch.arange(ACTIONS))  # the 6 unordered pairs of actions


class Draws(NamedTuple):
    """What one run of the experiment draws; float64."""

    states: Tensor  # [S, n]
    winners: Tensor  # [S, n] int64
    losers: Tensor  # [S, n] int64
    new_states: Tensor  # [S, m]
    initial: Tensor  # [S, 3, F]: where DPO, RMB-PO and RMB-PO+ start


def draw(seeds: Sequence[int], n: int, m: int) -> Draws:
    """n labelled pairs of distinct actions, the label Bernoulli(sigmoid(r(s, a) - r(s, a'))), and m more states."""
    numbers = uniforms(seeds, 0, (n, 4))
    states = numbers[..., 0]
    winners, losers = label(numbers[..., 3], true_rewards(states), *draw_pairs(numbers[..., 1:3], ACTIONS))
    return Draws(states, winners, losers, uniforms(seeds, 1, (m,)), uniforms(seeds, 2, (3, 2)))


def draw_pairs(numbers: Tensor, actions: int) -> tuple[Tensor, Tensor]:
    """Two distinct actions of 0..actions-1 from uniform numbers [..., 2], each [...] int64."""
    first = (numbers[..., 0] * actions).long()
    return first, (first + 1 + (numbers[..., 1] * (actions - 1)).long()) % actions


def label(numbers: Tensor, rewards: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Winners and losers of two actions by Bradley-Terry on rewards [..., A], from uniform numbers, all [...]."""
    second_wins = numbers < torch.sigmoid(of_action(rewards, second) - of_action(rewards, first))
    return torch.where(second_wins, second, first), torch.where(second_wins, first, second)


def features(states: Tensor, setting: Setting = "matched") -> Tensor:
    """phi(s, a), [...] -> [..., A, F]: ((a+1) cos(pi s), sin(pi s)/(a+1)); mismatched has sine and cosine swapped."""
    scale = torch.arange(1, ACTIONS + 1, dtype=states.dtype, device=states.device)
    cosine, sine = (torch.pi * states).cos()[..., None], (torch.pi * states).sin()[..., None]
    if setting == "mismatched":
        cosine, sine = sine, cosine
    return torch.stack((scale * cosine, sine / scale), -1)


def true_rewards(states: Tensor) -> Tensor:
    """r(s, a), [...] -> [..., A]."""
    return features(states) @ states.new_tensor(TRUE_THETA)


def differences(features: Tensor, winners: Tensor, losers: Tensor) -> Tensor:
    """phi(s, winner) - phi(s, loser), [..., A, F] and [...] -> [..., F]."""
    index = torch.stack((winners, losers), -1)[..., None].expand(*winners.shape, 2, features.shape[-1])
    chosen = features.gather(-2, index)
    return chosen[..., 0, :] - chosen[..., 1, :]


def quadrature(panels: int = 128, order: int = 8) -> tuple[Tensor, Tensor]:
    """Nodes and weights [panels * order] of composite Gauss-Legendre quadrature on [0, 1], in increasing order."""
    nodes, weights = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(order))
    left = torch.arange(panels, dtype=torch.float64)[:, None]
    return ((left + (nodes + 1) / 2) / panels).flatten(), (weights / (2 * panels)).repeat(panels)


def policy(theta: Tensor, states: Tensor, setting: Setting) -> Tensor:
    """pi(a|s), theta [..., F] and states [M] (or [..., M]) -> [..., M, A]."""
    return (features(states, setting) @ theta[..., None, :, None])[..., 0].softmax(-1)


def optimality_gap(theta: Tensor, setting: Setting) -> Tensor:
    """E_s[max_a r(s, a)] - E_s E_{a ~ pi}[r(s, a)] of each policy [..., F] by quadrature over 4096 states, [...].

    Both terms use the same states, so that the gap is never negative; a policy that jumps between actions costs an
    error of at most the jump times 1/2048.
    """
    states, weights = quadrature(512)
    rewards = true_rewards(states)
    return ((rewards.amax(-1, keepdim=True) - rewards) * policy(theta, states, setting)).sum(-1) @ weights


def sampled_gaps(thetas: Sequence[Tensor], seeds: Sequence[int], setting: Setting, size: int = 10_000) -> list[Tensor]:
    """The gap as the published code reports it, [S] per policy [S, F]: `size` states drawn for the best reward, once
    per seed, and others for every policy. Noisy (the best reward alone by 0.013), and it can be negative."""
    best = true_rewards(uniforms(seeds, 3, (size,))).amax(-1).mean(-1)
    gaps = []
    for number, theta in enumerate(thetas, 4):
        states = uniforms(seeds, number, (size,))
        gaps.append(best - (true_rewards(states) * policy(theta, states, setting)).sum(-1).mean(-1))
    return gaps


def of_action(values: Tensor, actions: Tensor) -> Tensor:
    """values [..., A] at actions [...], [...]."""
    return values.gather(-1, actions[..., None])[..., 0]


def uniforms(seeds: Sequence[int], stream: int, shape: tuple[int, ...]) -> Tensor:
    """[S, *shape] in [0, 1), from one stream of random numbers per seed and purpose."""
    return torch.from_numpy(np.stack([np.random.default_rng([seed, stream]).random(shape) for seed in seeds]))
