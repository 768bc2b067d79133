"""Preferences between all pairs of completions: Bradley-Terry, the DPO loss under them, and its exact minimiser.

Left out: other losses than DPO's (`rlhf_fast.dpo_loss` takes the pairs one by one) and leading axes in the minimiser.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf_fast.exact.optimum import implicit_rewards
from rlhf_fast.ops.checks import check_positive, expect


def bradley_terry(rewards: Tensor) -> Tensor:
    """p(y1 > y2 | x) = sigmoid(r(x, y1) - r(x, y2)), [..., N, N]; rewards: [..., N]."""
    return (rewards[..., :, None] - rewards[..., None, :]).sigmoid()


def dpo_population_loss(
    logprobs: Tensor, ref_logprobs: Tensor, preferences: Tensor, beta: float, *, pair_weights: Tensor | None = None
) -> Tensor:
    """DPO's loss (arXiv 2305.18290, eq. 7) with every pair in its true proportion, [...]; differentiable:

        L = -sum_{y1, y2} w(y1, y2) p(y1 > y2) log sigmoid(beta log pi(y1)/ref(y1) - beta log pi(y2)/ref(y2))

    Args:
        logprobs, ref_logprobs: [..., N].
        preferences: [..., N, N], p(y1 > y2), for example `bradley_terry` of the true rewards.
        pair_weights: [..., N, N], symmetric, how often each pair is compared; by default both are drawn from the
            reference, w = ref(y1) ref(y2).

    Raises:
        ValueError: beta <= 0; pair_weights that are not symmetric; shapes, dtypes or devices that do not fit.
    """
    rewards = implicit_rewards(logprobs, ref_logprobs, beta)
    weights = _weights(ref_logprobs, preferences, pair_weights)
    return -(weights * preferences * F.logsigmoid(rewards[..., :, None] - rewards[..., None, :])).sum((-2, -1))


def dpo_minimiser(
    ref_logprobs: Tensor, preferences: Tensor, beta: float, *, pair_weights: Tensor | None = None
) -> Tensor:
    """log pi [N] that minimises `dpo_population_loss` over all policies, by Newton's method on the implicit rewards.

    As a function of the implicit rewards the loss is a reward model's, which is convex. Every reward function belongs
    to one policy, pi = ref exp(r / beta) / Z (theorem 1 of the DPO paper). Under Bradley-Terry preferences the
    minimiser is `optimum` of their rewards, whatever the weights. It exists where a chain of preferred pairs leads from
    any completion to any other.

    Args, one prompt: ref_logprobs [N], finite; preferences and pair_weights [N, N].

    Raises:
        ValueError: no minimiser; beta <= 0; pair_weights that are not symmetric; shapes, dtypes or devices that do
            not fit.
    """
    check_positive("beta", beta)
    expect(ref_logprobs.dim() == 1, "ref_logprobs", "shape [N]", list(ref_logprobs.shape))
    wins_NN = (_weights(ref_logprobs, preferences, pair_weights) * preferences).fill_diagonal_(0)
    expect(_strongly_connected(wins_NN > 0), "preferences", "a chain of preferences from any completion to any other",
           "none, so that the loss has no minimum")  # fmt: skip
    games_NN = wins_NN + wins_NN.T
    rewards_N, last = torch.zeros_like(ref_logprobs), math.inf
    while True:
        p_NN = bradley_terry(rewards_N)
        gradient_N = (games_NN * p_NN - wins_NN).sum(1)
        curvature_NN = games_NN * p_NN * (1 - p_NN)
        degree_N = curvature_NN.sum(1)
        # a constant added to all rewards changes nothing; without the mean degree the matrix would be singular for it
        hessian_NN = degree_N.diag() - curvature_NN + degree_N.mean()
        step_N = torch.linalg.solve(hessian_NN, gradient_N)
        size = (step_N.max() - step_N.min()).item()
        if size < 1e-6 and size >= last:  # only rounding is left
            return (ref_logprobs + rewards_N / beta).log_softmax(-1)
        # the damping under which Newton converges from anywhere (Sun and Tran-Dinh 2019, generalised self-concordance)
        rewards_N, last = rewards_N - step_N * (math.log1p(size) / size if size else 1.0), size


def _strongly_connected(edges_NN: Tensor) -> bool:
    """Whether a directed path leads from every node to every other, by squaring the reachability matrix."""
    reach_NN = (edges_NN | torch.eye(len(edges_NN), dtype=torch.bool, device=edges_NN.device)).float()
    for _ in range(len(edges_NN).bit_length()):
        reach_NN = (reach_NN @ reach_NN > 0).float()
    return bool(reach_NN.all())


def _weights(ref_logprobs: Tensor, preferences: Tensor, pair_weights: Tensor | None) -> Tensor:
    shape = [*ref_logprobs.shape, ref_logprobs.shape[-1]]
    if pair_weights is None:
        pair_weights = (ref_logprobs[..., :, None] + ref_logprobs[..., None, :]).exp()
    for name, x in {"preferences": preferences, "pair_weights": pair_weights}.items():
        expect(list(x.shape) == shape, name, f"shape {shape}", list(x.shape))
    expect(torch.equal(pair_weights, pair_weights.mT), "pair_weights", "a symmetric matrix", "another")
    return pair_weights
