"""The neural bandit's experiment: every method from the same draws and the same initial policy, some seeds at a time.

Methods: `dpo`, `dpo_published` (probabilities in place of log-probabilities), `rmb_po` (the learned reward's policy on
the n preference states), `rmb_po_plus@RATIO` (on int(RATIO n) more states), all for 50 epochs. More states are more
batches and so more steps; `rmb_po_plus@RATIO_matched_steps` takes RMB-PO's number of steps, and RMB-PO itself takes as
many as RMB-PO+ at the largest ratio in `rmb_po@RATIO_matched_steps`.

Left out: the optima of the objectives, which these steps need not reach.
"""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_fast.lab.bandit import neural
from rlhf_fast.lab.bandit.config import NeuralBanditConfig, seeds_of
from rlhf_fast.lab.bandit.neural_problem import draw, evaluation, fresh, initial_policy, learned_reward, true_reward

_SEEDS = 5  # at a time, for memory and caches
_FRESH = 4096  # states that stand in for all


class Run(NamedTuple):
    """Every tensor is [S]."""

    gaps: dict[str, Tensor]  # method -> optimality gap
    references: dict[str, Tensor]  # gap of the uniform policy and of the best single action
    commonest_best_action: Tensor  # share of the states where the commonest best action is best
    sources: dict[str, dict[str, Tensor]]  # method -> piece made exact -> optimality gap
    steps: dict[str, int]  # method -> gradient steps; not per seed


def run(config: NeuralBanditConfig, n: int, *, error_sources: bool) -> Run:
    """Every method on n preferences of every seed.

    error_sources: train each method again, the same number of steps, with one piece at a time made exact:
    reward: the true reward in place of the learned one; DPO's labels become probabilities under it.
    actions: DPO sees all pairs of actions in its states, labelled by the learned reward. RMB-PO's sum over actions is
    exact already. states: 4096 fresh states in place of the sample, for DPO with a random pair in each, labelled by the
    learned reward. all: the three together.
    """
    seeds = seeds_of(config)
    parts = [_run(config, seeds[start : start + _SEEDS], n, error_sources) for start in range(0, len(seeds), _SEEDS)]
    gaps, references, commonest, sources = (_joined(column) for column in list(zip(*parts, strict=True))[:-1])
    return Run(gaps, references, commonest, sources, parts[0].steps)


def _run(config: NeuralBanditConfig, seeds: range, n: int, error_sources: bool) -> Run:
    truth = true_reward(seeds, config.reward)
    evaluated = evaluation(seeds, truth)
    draws = draw(seeds, truth, n, max((int(ratio * n) for ratio in config.ratios), default=0))
    learned = learned_reward(seeds, config.reward)
    neural.fit_reward(learned, draws.states, draws.winners, draws.losers)
    learned.requires_grad_(False)
    start = initial_policy(seeds)

    plans = _plans(config, draws.states, draws.new_states)
    few = plans["rmb_po"][1]

    def dpo(states: Tensor, wins: Tensor, form: neural.DPOForm = "log_probabilities") -> Tensor:
        policy = deepcopy(start)
        neural.dpo(policy, states, wins, few, config.beta, form)
        return evaluated.gap(policy)

    def rmb_po(states: Tensor, rewards: Tensor, count: int) -> Tensor:
        policy = deepcopy(start)
        neural.rmb_po(policy, states, rewards, count, config.beta)
        return evaluated.gap(policy)

    wins = neural.observed(draws.winners, draws.losers)
    gaps = {"dpo": dpo(draws.states, wins), "dpo_published": dpo(draws.states, wins, "probabilities")}
    gaps |= {name: rmb_po(states, learned(states), count) for name, (states, count) in plans.items()}
    sources = {}
    if error_sources:
        everywhere, *pairs = fresh(seeds, _FRESH)
        by_learned, by_truth = learned(everywhere), truth(everywhere)
        sources["dpo"] = {
            "reward": dpo(draws.states, neural.expected(truth(draws.states), draws.winners, draws.losers)),
            "actions": dpo(draws.states, neural.all_pairs(learned(draws.states))),
            "states": dpo(everywhere, neural.expected(by_learned, *pairs)),
            "all": dpo(everywhere, neural.all_pairs(by_truth)),
        }
        for name, (states, count) in plans.items():
            if name.endswith("_matched_steps"):
                continue
            sources[name] = {
                "reward": rmb_po(states, truth(states), count),
                "actions": gaps[name],
                "states": rmb_po(everywhere, by_learned, count),
                "all": rmb_po(everywhere, by_truth, count),
            }
    steps = {"dpo": few, "dpo_published": few, **{name: count for name, (_, count) in plans.items()}}
    references = {"uniform": evaluated.uniform_gap(), "best single action": evaluated.single_action_gap()}
    return Run(gaps, references, evaluated.commonest_best_action(), sources, steps)


def _plans(config: NeuralBanditConfig, states: Tensor, new_states: Tensor) -> dict[str, tuple[Tensor, int]]:
    """The states on which each reward-model method optimises, in the published order, and its steps."""
    n = states.shape[1]
    few = neural.steps_of(neural.POLICY_EPOCHS, n)
    plans = {"rmb_po": (states, few)}
    for ratio in config.ratios:
        new = new_states[:, : int(ratio * n)]
        union = torch.cat((new, states), 1) if config.pref_states else new
        plans[f"rmb_po_plus@{ratio:g}"] = union, neural.steps_of(neural.POLICY_EPOCHS, union.shape[1])
    for ratio in config.ratios:
        plans[f"rmb_po_plus@{ratio:g}_matched_steps"] = plans[f"rmb_po_plus@{ratio:g}"][0], few
    if config.ratios:
        largest = f"@{max(config.ratios):g}"
        plans[f"rmb_po{largest}_matched_steps"] = states, plans[f"rmb_po_plus{largest}"][1]
    return plans


def _joined(parts: tuple) -> Any:
    """Tensors of consecutive seeds as one, in dicts of any depth."""
    if isinstance(parts[0], dict):
        return {key: _joined(tuple(part[key] for part in parts)) for key in parts[0]}
    return torch.cat(parts)
