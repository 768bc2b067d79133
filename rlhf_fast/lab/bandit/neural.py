"""Maximum likelihood, DPO, RMB-PO and RMB-PO+ on the neural bandit as published, the networks of all seeds at once.

AdamW without weight decay, batches of 64 in the data's order; an epoch's last batch may be smaller and counts as much.
float64 where the published code has float32 (see `networks`).
DPO's pairs are weights on every ordered pair of actions, so that sampled labels, probabilities and all pairs of a state
are one loss. The published code feeds probabilities where DPO has log-probabilities; both forms are here.
The reference policy is uniform.

Shapes: S seeds, n preferences, M states, D numbers in a state, A actions.
"""

import math
from collections.abc import Callable
from itertools import cycle, islice
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softplus

from rlhf_fast.lab.bandit.networks import ACTIONS, Layers, Reward
from rlhf_fast.lab.bandit.problem import of_action

LEARNING_RATE, BATCH, REWARD_EPOCHS, POLICY_EPOCHS = 1e-3, 64, 20, 50
DPOForm = Literal["log_probabilities", "probabilities"]


def steps_of(epochs: int, size: int) -> int:
    """Gradient steps of so many epochs."""
    return epochs * -(-size // BATCH)


def fit_reward(reward: Reward, states: Tensor, winners: Tensor, losers: Tensor) -> None:
    """Trains reward on states [S, n, D] and actions [S, n]: mean of -log sigmoid(r(s, winner) - r(s, loser))."""

    def loss(batch: slice) -> Tensor:
        rewards = reward(states[:, batch])
        return softplus(of_action(rewards, losers[:, batch]) - of_action(rewards, winners[:, batch]))

    _train(reward, loss, states.shape[1], steps_of(REWARD_EPOCHS, states.shape[1]))


def dpo(
    policy: Layers, states: Tensor, wins: Tensor, steps: int, beta: float, form: DPOForm = "log_probabilities"
) -> None:
    """Trains policy on states [S, M, D] and `wins` [S, M, A, A], the weight of "action preferred to action"."""

    def loss(batch: slice) -> Tensor:
        return dpo_losses(policy(states[:, batch]), wins[:, batch], beta, form)

    _train(policy, loss, states.shape[1], steps)


def dpo_losses(logits: Tensor, wins: Tensor, beta: float, form: DPOForm) -> Tensor:
    """-sum_{a, a'} wins(a, a') log sigmoid(beta (x(a) - x(a'))), x = log pi or pi; [..., A], [..., A, A] -> [...]."""
    x = logits.log_softmax(-1) if form == "log_probabilities" else logits.softmax(-1)
    return (wins * softplus(-beta * (x[..., :, None] - x[..., None, :]))).sum((-1, -2))


def rmb_po(policy: Layers, states: Tensor, rewards: Tensor, steps: int, beta: float) -> None:
    """Trains policy on states [S, M, D]: mean_s sum_a pi(a|s) (r - beta log(pi / uniform)), exact over actions.

    rewards [S, M, A]. The bracket carries no gradient, as published; its gradient would be beta sum_a grad pi = 0.
    """

    def loss(batch: slice) -> Tensor:
        logp = policy(states[:, batch]).log_softmax(-1)
        value = rewards[:, batch] - beta * (logp.detach() + math.log(ACTIONS))
        return -(logp.exp() * value).sum(-1)

    _train(policy, loss, states.shape[1], steps)


def observed(winners: Tensor, losers: Tensor) -> Tensor:
    """`wins` of labelled pairs [S, n]: one at (winner, loser)."""
    return one_hot(winners, ACTIONS)[..., :, None].double() * one_hot(losers, ACTIONS)[..., None, :]


def expected(rewards: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """`wins` of pairs [S, M] labelled by Bradley-Terry's probabilities under rewards [S, M, A]."""
    pairs = observed(first, second) + observed(second, first)
    return pairs * torch.sigmoid(rewards[..., :, None] - rewards[..., None, :])


def all_pairs(rewards: Tensor) -> Tensor:
    """`wins` of every pair of actions in every state, labelled as in `expected`; a state's weights sum to 1."""
    pairs = (1 - torch.eye(ACTIONS, dtype=rewards.dtype, device=rewards.device)) / (ACTIONS * (ACTIONS - 1) / 2)
    return pairs * torch.sigmoid(rewards[..., :, None] - rewards[..., None, :])


def _train(network: nn.Module, losses: Callable[[slice], Tensor], size: int, steps: int) -> None:
    """So many AdamW steps on the mean of losses [S, B], batch after batch of `size` rows, over and over.

    Seeds share no weight, and AdamW is elementwise: the gradient of the sum over seeds is each seed's own.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for start in islice(cycle(range(0, size, BATCH)), steps):
        optimizer.zero_grad()
        losses(slice(start, start + BATCH)).mean(1).sum().backward()
        optimizer.step()
