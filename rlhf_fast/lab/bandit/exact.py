"""The global optimum of each method's objective on the linear bandit, in float64, without an optimiser's artefacts.

DPO's loss is a logistic regression on phi_pi differences, concave in theta: Newton's method finds its optimum. RMB-PO's
objective J(theta) = E_s[sum_a pi r - beta KL(pi || uniform)] is concave in the policy, not in theta; its optimum is the
best of Newton ascents from the reward's projection on the features and from the local maxima of a polar grid.
With phi_pi = phi_r all optima are the reward's theta / beta (J = const - beta E_s KL(pi || pi*)).
Left out: a proof that the best is global. On up to 256 states the grid holds every deterministic policy; on more it is
made from 256 of them, and a narrow peak can be missed.

With beta = 0.01 policies are nearly deterministic, and on few states J can be flat to all digits around its maximum:
among optima that agree to 1e-12 the one reached from the projection is taken, else the first that the grid leads to.
Such optima act alike on the objective's states, not always on others.

Shapes: S seeds, M states, A actions, F features, K candidates.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import max_pool2d, pad

from rlhf_fast.lab.bandit.problem import ACTIONS, PAIRS

_RADII, _PEAKS = (0.03, 0.1, 0.2, 0.4, 0.8, 1.5, 4.0, 12.0), 48
_GRID_STATES = 256  # with every second of 220 states the grid missed 5 of 60 optima, by 0.011 at most
_LOWEST = -80.0  # smallest logit relative to the largest: exp takes many times as long where it underflows
_DIRECTIONS = 256  # at a time, so that they stay in the caches
_SEEDS = 20  # at a time, because of memory and caches


class Optimum(NamedTuple):
    """The best theta of every seed."""

    theta: Tensor  # [S, F]
    value: Tensor  # [S] the objective there
    gradient: Tensor  # [S] norm of its gradient


def maximise(features: Tensor, rewards: Tensor, weights: Tensor, beta: float) -> Optimum:
    """The best theta for features [S or 1, M, A, F], rewards [S, M, A] and state weights [M] that sum to 1."""
    features = features.expand(len(rewards), *features.shape[1:])
    chunks = zip(features.split(_SEEDS), rewards.split(_SEEDS), strict=True)
    parts = [_maximise(*chunk, weights, beta) for chunk in chunks]
    return Optimum(*(torch.cat(column) for column in zip(*parts, strict=True)))


def objective(
    features: Tensor, rewards: Tensor, weights: Tensor, beta: float, theta: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """J [S, K], its gradient [S, K, F] and Hessian [S, K, F, F] at theta [S, K, F]; features [S, M, A, F]."""
    logp, probability, value = _policy(features, rewards, beta, theta)
    mean = (probability * value).sum(-1)
    centred = features[:, None] - (probability[..., None] * features[:, None]).sum(-2, keepdim=True)
    mass = probability * weights[:, None]
    pull = mass * (value - mean[..., None])
    gradient = torch.einsum("skma,skmaf->skf", pull, centred)
    hessian = torch.einsum("skma,skmaf,skmag->skfg", pull - beta * mass, centred, centred)
    return mean @ weights, gradient, hessian


def _policy(features: Tensor, rewards: Tensor, beta: float, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log pi, pi and r - beta log(pi / uniform), each [S, K, M, A]."""
    logits = theta @ features.flatten(1, 2).transpose(1, 2)
    logp = logits.view(*theta.shape[:2], *rewards.shape[1:]).log_softmax(-1)
    return logp, logp.exp(), rewards[:, None] - beta * (logp + math.log(ACTIONS))


def _value(features: Tensor, rewards: Tensor, weights: Tensor, beta: float, theta: Tensor) -> Tensor:
    _, probability, value = _policy(features, rewards, beta, theta)
    return (probability * value).sum(-1) @ weights


def _maximise(features: Tensor, rewards: Tensor, weights: Tensor, beta: float) -> Optimum:
    theta = _ascend(features, rewards, weights, beta, _project(features, rewards / beta), 100)
    # The best policy of all, expressible or not, has the value beta E_s[log Z(s)]. Seeds that reach it need no search.
    bound = beta * ((rewards / beta).logsumexp(-1) - math.log(ACTIONS)) @ weights
    below = _value(features, rewards, weights, beta, theta)[:, 0] < bound - 1e-12
    if below.any():
        theta[below] = _search(features[below], rewards[below], weights, beta, theta[below])
    value, gradient, _ = objective(features, rewards, weights, beta, theta)
    return Optimum(theta[:, 0], value[:, 0], gradient[:, 0].norm(dim=-1))


def _search(features: Tensor, rewards: Tensor, weights: Tensor, beta: float, first: Tensor) -> Tensor:
    """The best of `first` [S, 1, F] and of the optima above the polar grid's local maxima, [S, 1, F]."""
    problem = features, rewards, weights, beta

    def best(starts: Tensor, count: int) -> Tensor:
        rows = _value(*problem, starts).topk(count, dim=1).indices
        return starts.gather(1, rows[..., None].expand(*rows.shape, 2))

    def ascend(starts: Tensor, steps: int) -> Tensor:
        return torch.cat([_ascend(*problem, start, steps) for start in starts.unbind(1)], 1)

    screened = ascend(best(_basins(*problem), 10), 12)
    theta = torch.cat((first, ascend(best(screened, 2), 100)), 1)
    value = _value(*problem, theta)
    chosen = (value >= value.amax(1, keepdim=True) - 1e-12).int().argmax(1)  # the first of equals
    return theta[torch.arange(len(theta), device=theta.device), chosen][:, None]


def _ascend(features: Tensor, rewards: Tensor, weights: Tensor, beta: float, start: Tensor, steps: int) -> Tensor:
    """At most `steps` steps of Newton ascent from [S, F] to [S, 1, F].

    Curvature counts by its size, so that every direction climbs; a step is halved until J does not fall.
    """
    result = start[:, None].clone()
    rows = torch.arange(len(start), device=start.device)
    for _ in range(steps):
        theta = result[rows]
        value, gradient, hessian = objective(features, rewards, weights, beta, theta)
        climbing = gradient[:, 0].norm(dim=-1) > 1e-12
        rows, theta, value, gradient, hessian = (x[climbing] for x in (rows, theta, value, gradient, hessian))
        features, rewards = features[climbing], rewards[climbing]  # most are there after a few steps
        if not len(rows):
            break
        curvature, axes = torch.linalg.eigh(hessian)
        size = curvature.abs()
        size = size.clamp_min(1e-14 * size.amax(-1, keepdim=True)).clamp_min(1e-300)
        step = (axes @ ((axes.transpose(-1, -2) @ gradient[..., None]) / size[..., None]))[..., 0]
        longest = 0.5 * theta.norm(dim=-1, keepdim=True) + 1
        step = step * (longest / step.norm(dim=-1, keepdim=True).clamp_min(1e-300)).clamp_max(1.0)
        scale = torch.ones_like(value)
        for _ in range(40):
            worse = _value(features, rewards, weights, beta, theta + scale[..., None] * step) < value - 1e-15
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        result[rows] = theta + scale[..., None] * step
    return result


def _project(features: Tensor, targets: Tensor) -> Tensor:
    """Least-squares fit of features . theta to targets [S, M, A] up to a shift per state, [S, F]."""
    features, targets = features - features.mean(-2, keepdim=True), targets - targets.mean(-1, keepdim=True)
    return torch.linalg.lstsq(features.flatten(1, 2), targets.flatten(1)[..., None]).solution[..., 0]


def _basins(features: Tensor, rewards: Tensor, weights: Tensor, beta: float) -> Tensor:
    """The highest local maxima of J on a polar grid, [S, K, F]; float32 is enough to find them.

    A direction of theta is a ranking of the actions in every state. One angle lies in each interval between two
    changes of a ranking, so that on few states every deterministic policy that theta can express is tried.
    """
    # Logits that reproduce the rewards have about this size; the projection of a mismatched reward can be small.
    spread = (rewards.amax(-1) - rewards.amin(-1)).mean(-1) / beta
    stride = -(-rewards.shape[1] // _GRID_STATES)
    features, rewards, weights = features[:, ::stride], rewards[:, ::stride].float(), weights[::stride].float()
    normals = (features[:, :, PAIRS[:, 0]] - features[:, :, PAIRS[:, 1]]).flatten(1, 2)
    changes = torch.atan2(normals[..., 0], -normals[..., 1])
    changes = torch.cat((changes, changes + math.pi), 1).remainder(2 * math.pi).sort(1).values
    angles = (changes + torch.cat((changes[:, 1:], changes[:, :1] + 2 * math.pi), 1)) / 2
    circle = torch.stack((angles.cos(), angles.sin()), -1)
    radii = spread[:, None] * torch.tensor(_RADII, dtype=spread.dtype, device=spread.device)
    grid = radii[:, :, None, None] * circle[:, None]  # [S, radius, angle, F]
    features, weights = features.float(), weights / weights.sum()
    value = torch.stack([_rings(*x, weights, beta) for x in zip(features, rewards, circle.float(), radii, strict=True)])
    around = max_pool2d(pad(pad(value, (1, 1), mode="circular"), (0, 0, 1, 1), value=-math.inf), 3, stride=1)
    peaks = torch.where(value >= around, value, -math.inf).flatten(1)
    best = peaks.topk(_PEAKS, dim=1).indices
    return grid.flatten(1, 2).gather(1, best[..., None].expand(*best.shape, 2))


def _rings(features: Tensor, rewards: Tensor, circle: Tensor, radii: Tensor, weights: Tensor, beta: float) -> Tensor:
    """J of one seed at every radius times every direction [K, F], [radius, K]: `_value` without its large temporaries.

    Actions come first and directions last, some at a time, so that what one radius takes stays in the cache.
    """
    logits = features.transpose(0, 1) @ circle.T  # [A, M, K]
    logits -= logits.amax(0)
    rewards, shift = rewards.T[..., None], beta * math.log(ACTIONS)
    blocks = []
    for block in logits.split(_DIRECTIONS, -1):
        rings = []
        for radius in radii.tolist():
            scaled = (block * radius).clamp_(min=_LOWEST)
            mass = scaled.exp()
            total = mass.sum(0)
            value = scaled.mul_(-beta).add_(rewards).mul_(mass).sum(0).div_(total).add_(total.log_(), alpha=beta)
            rings.append(weights @ value)
        blocks.append(torch.stack(rings))
    return torch.cat(blocks, 1) - shift
