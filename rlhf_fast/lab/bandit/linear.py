"""DPO, RMB-PO and RMB-PO+ on the linear bandit as published: AdaGrad-norm ascent, all seeds at once.

The published code's step counts, precisions and its 1e-6 inside DPO's logarithm are kept, because they decide
its figures: log(pi + 1e-6) bounds what beta can multiply, so that with beta = 0.01 DPO's logistic weights stay near 1/2
and it follows the mean feature difference. `exact.py` has the optima that these iterations do not reach.

Shapes: S seeds, n preferences, M states, A actions, F features.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_fast.lab.bandit.problem import ACTIONS, differences

DPO_STEPS, RMB_STEPS = 200, 1000


class Fit(NamedTuple):
    """The maximum-likelihood theta of every seed."""

    theta: Tensor  # [S, F]
    separable: Tensor  # [S] bool: every pair is ranked right, so that the maximum lies at infinity
    gradient: Tensor  # [S] norm of the gradient where the iteration ended


def fit_preferences(rows: Tensor, win: Tensor, weights: Tensor, tolerance: float = 1e-12) -> Fit:
    """Maximum likelihood of sigmoid(row . theta) = win, by Newton's method with backtracking, in float64.

    rows [S or 1, K, F] are feature differences, win [S or 1, K] in [0, 1] (1: an observed win), weights [S or 1, K].
    Separable data have no maximum; theta is then where the gradient fell below `tolerance`, beyond which no policy
    changes visibly.
    """
    size = max(len(rows), len(win), len(weights))
    theta = rows.new_zeros(size, rows.shape[-1])
    identity = torch.eye(theta.shape[-1], dtype=theta.dtype, device=theta.device)

    def loss(theta: Tensor) -> Tensor:
        z = _product(rows, theta)
        return (weights * (softplus(-z) + (1 - win) * z)).sum(-1)

    for _ in range(100):
        z = _product(rows, theta)
        up, down = torch.sigmoid(z), torch.sigmoid(-z)  # 1 - sigmoid(z) would lose its digits
        gradient = ((weights * ((1 - win) * up - win * down))[..., None] * rows).sum(-2)
        active = gradient.norm(dim=-1) > tolerance
        if not active.any():
            break
        hessian = (rows * (weights * up * down)[..., None]).transpose(-1, -2) @ rows
        damping = 1e-12 * hessian.diagonal(dim1=-2, dim2=-1).sum(-1) + 1e-300
        step = torch.linalg.solve(hessian + damping[..., None, None] * identity, gradient)
        scale, before = active.double(), loss(theta)
        for _ in range(40):
            worse = loss(theta - scale[:, None] * step) > before + 1e-15  # rounding
            if not worse.any():
                break
            scale = torch.where(worse, scale / 2, scale)
        theta = theta - scale[:, None] * step
    separable = ((weights == 0) | ((win == 1) & (_product(rows, theta) > 0))).all(-1)
    return Fit(theta, separable.expand(size), gradient.norm(dim=-1).expand(size))


def dpo(features: Tensor, winners: Tensor, losers: Tensor, start: Tensor, beta: float) -> Tensor:
    """features [S, n, A, F] and winning and losing actions [S, n], from start [S, F] -> theta [S, F]."""
    features = features.float()
    index = torch.stack((winners, losers), -1)
    difference = differences(features, winners, losers)
    theta, squares = start, start.new_zeros(len(start), 1)
    for _ in range(DPO_STEPS):
        logp = (_product(features, theta.float()).softmax(-1) + 1e-6).log().gather(-1, index)
        weight = torch.sigmoid(-beta * (logp[..., 0] - logp[..., 1]))
        gradient = beta * (weight[..., None] * difference).mean(1).double()
        squares = squares + gradient.square().sum(-1, keepdim=True)
        theta = theta + gradient / squares.sqrt()
    return theta


def rmb_po(features: Tensor, rewards: Tensor, start: Tensor, beta: float) -> Tensor:
    """Ascent of mean_s sum_a pi(a|s) (r(s, a) - beta log(pi(a|s) / pi_ref)), pi_ref uniform, with exact gradients.

    features [S, M, A, F], rewards [S, M, A], from start [S, F] -> theta [S, F].
    """
    features, rewards = features.float(), rewards.float()
    flat = features.flatten(1, 2)
    shift = rewards - beta * torch.tensor(float(ACTIONS)).log()
    theta, squares = start, start.new_zeros(len(start), 1)
    for _ in range(RMB_STEPS):
        logp = (flat @ theta.float()[..., None]).view_as(rewards).log_softmax(-1)
        probability, value = logp.exp(), shift - beta * logp
        weight = probability * (value - (probability * value).sum(-1, keepdim=True))
        gradient = (weight.view(len(flat), 1, -1) @ flat)[:, 0].double() / rewards.shape[1]
        squares = squares + gradient.square().sum(-1, keepdim=True)
        theta = theta + gradient / squares.sqrt()
    return theta


def _product(features: Tensor, theta: Tensor) -> Tensor:
    """features [S or 1, ..., F] . theta [S, F] -> [S, ...]."""
    flat = features.reshape(len(features), -1, features.shape[-1])
    product = (flat @ theta[..., None])[..., 0]
    return product.view(len(product), *features.shape[1:-1])
