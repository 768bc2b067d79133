"""The linear bandit's experiment: every method on the same draws, and what each empirical piece costs it.

A method is `dpo`, `rmb_po` (the reward model's optimum on the n preference states) or `rmb_po_plus@RATIO` (on
int(RATIO n) more states). Three things separate a method from the optimum under the true reward: the learned reward,
finitely many actions and finitely many states. `error_sources` replaces one at a time by its exact counterpart.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.lab.bandit import exact, linear
from rlhf_fast.lab.bandit.config import LinearBanditConfig, seeds_of
from rlhf_fast.lab.bandit.problem import (
    PAIRS,
    TRUE_THETA,
    Draws,
    Setting,
    differences,
    draw,
    features,
    optimality_gap,
    quadrature,
)


class Run(NamedTuple):
    """Every method on n preferences of S seeds."""

    n: int
    draws: Draws
    reward: linear.Fit  # of the preferences
    separable: Tensor  # [S] bool: a likelihood (exact mode: DPO's too) has its maximum at infinity
    thetas: dict[str, Tensor]  # method -> [S, F]
    largest_gradient: float | None  # exact mode: over all optima


def run(config: LinearBanditConfig, n: int) -> Run:
    """Every method on n preferences of every seed."""
    m = max((int(ratio * n) for ratio in config.ratios), default=0)
    draws = draw(seeds_of(config), n, m)
    reward = _fit(draws, "matched")
    thetas, gradients, separable = {}, [reward.gradient], reward.separable
    if config.mode == "faithful":
        policy_features = features(draws.states, config.setting)
        thetas["dpo"] = linear.dpo(policy_features, draws.winners, draws.losers, draws.initial[:, 0], config.beta)
    else:
        fit = _fit(draws, config.setting)
        thetas["dpo"] = fit.theta / config.beta
        gradients.append(fit.gradient)
        separable = separable | fit.separable
    for name, states in _states(config, draws).items():
        rewards = _rewards(states, reward.theta)
        if config.mode == "faithful":
            start = draws.initial[:, 1 if name == "rmb_po" else 2]
            thetas[name] = linear.rmb_po(features(states, config.setting), rewards, start, config.beta)
        else:
            optimum = exact.maximise(features(states, config.setting), rewards, _mean(states.shape[1]), config.beta)
            thetas[name] = optimum.theta
            gradients.append(optimum.gradient)
    largest = max(gradient.max().item() for gradient in gradients) if config.mode == "exact" else None
    return Run(n, draws, reward, separable, thetas, largest)


def error_sources(config: LinearBanditConfig, run: Run) -> dict[str, dict[str, Tensor]]:
    """method -> piece made exact -> optimality gap [S] of the exact optimum.

    reward: DPO's labels become probabilities under the true reward, RMB-PO's learned reward the true one.
    actions: DPO sees all pairs of actions in its states, labelled by the learned reward; RMB-PO's expectation over
    actions is exact already. states: all of [0, 1] in place of the sample, with the sampled pairs (labelled by the
    learned reward) or the learned reward. all: the three together, the same for every seed.
    """
    setting, beta, draws = config.setting, config.beta, run.draws
    nodes, weights = quadrature()
    by_node = features(nodes, setting)[None]
    first, second = PAIRS[:, 0], PAIRS[:, 1]
    uniform_pairs = torch.full((len(PAIRS),), 1 / len(PAIRS), dtype=torch.float64)

    def preferences(states: Tensor, weight: Tensor, theta: Tensor) -> Tensor:
        """Gap of DPO on all pairs of actions in states [S or 1, M], weight [S or 1, M, 6], labelled by theta."""
        shape = *states.shape, len(PAIRS)
        pairs = [
            differences(phi[:, :, None].expand(*shape, *phi.shape[2:]), first.expand(shape), second.expand(shape))
            for phi in (features(states), features(states, setting))
        ]
        win = torch.sigmoid((pairs[0].flatten(1, 2) @ theta[..., None])[..., 0])
        fit = linear.fit_preferences(pairs[1].flatten(1, 2), win, weight.flatten(1))
        return optimality_gap(fit.theta / beta, setting)

    def rewards(states: Tensor, theta: Tensor, by_state: Tensor, weight: Tensor) -> Tensor:
        return optimality_gap(exact.maximise(by_state, _rewards(states, theta), weight, beta).theta, setting)

    size, n = draws.states.shape
    truth = draws.states.new_tensor([TRUE_THETA])
    sampled = (draws.winners[..., None] == PAIRS[:, 0]) & (draws.losers[..., None] == PAIRS[:, 1])
    sampled = sampled | (draws.winners[..., None] == PAIRS[:, 1]) & (draws.losers[..., None] == PAIRS[:, 0])
    per_state = _mean(n)[:, None]
    everywhere = weights[:, None]
    gaps = {
        "dpo": {
            "reward": preferences(draws.states, sampled * per_state, truth.expand(size, 2)),
            "actions": preferences(draws.states, (per_state * uniform_pairs)[None], run.reward.theta),
            "states": preferences(nodes[None], everywhere * sampled.double().mean(1, keepdim=True), run.reward.theta),
            "all": preferences(nodes[None], (everywhere * uniform_pairs)[None], truth).expand(size),
        }
    }
    all_states = rewards(nodes.expand(size, -1), run.reward.theta, by_node, weights)
    everything = rewards(nodes[None], truth, by_node, weights).expand(size)
    for name, states in _states(config, draws).items():
        true = rewards(states, truth.expand(size, 2), features(states, setting), _mean(states.shape[1]))
        unchanged = optimality_gap(run.thetas[name], setting)
        gaps[name] = {"reward": true, "actions": unchanged, "states": all_states, "all": everything}
    return gaps


def gaps_of(config: LinearBanditConfig, thetas: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Method -> optimality gap [S] of its policy."""
    return {name: optimality_gap(theta, config.setting) for name, theta in thetas.items()}


def _states(config: LinearBanditConfig, draws: Draws) -> dict[str, Tensor]:
    """The states on which each reward-model method optimises."""
    states = {"rmb_po": draws.states}
    for ratio in config.ratios:
        new = draws.new_states[:, : int(ratio * draws.states.shape[1])]
        states[f"rmb_po_plus@{ratio:g}"] = torch.cat((draws.states, new), 1) if config.pref_states else new
    return states


def _fit(draws: Draws, setting: Setting) -> linear.Fit:
    rows = differences(features(draws.states, setting), draws.winners, draws.losers)
    return linear.fit_preferences(rows, torch.ones_like(draws.states), _mean(draws.states.shape[1])[None])


def _rewards(states: Tensor, theta: Tensor) -> Tensor:
    """phi_r(s, a) . theta, [S, M] and [S, F] -> [S, M, A]."""
    return (features(states) @ theta[:, None, :, None])[..., 0]


def _mean(size: int) -> Tensor:
    return torch.full((size,), 1 / size, dtype=torch.float64)
