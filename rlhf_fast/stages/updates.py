"""The updates of the online methods: a plain policy-gradient step, or several epochs of minibatches on a rollout."""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.config import ClippedConfig
from rlhf_fast.ops import whiten
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.shares import Shares
from rlhf_fast.training.learner import take_step, training_passes
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally

Clipped = TypeVar("Clipped", bound=ClippedConfig)


def several_epochs(
    online: Online[Clipped],
    experience: Experience,
    targets: tuple[Tensor, ...],
    minibatch_update: Callable[[Rollout, tuple[Tensor, ...], Shares, bool], dict[str, float]],
    *,
    counted: Tensor | None = None,
) -> dict[str, float]:
    """config.epochs passes over a rollout in config.minibatches steps each; returns the mean of the steps' metrics.

    targets: tensors with a row for each row of the rollout.
    minibatch_update: takes one optimizer step on the rows of `(rollout, targets, shares, untouched)`. shares: what the
        processes have of the minibatch. untouched: True while the policy is still the policy that sampled.
    counted: [batch_size] bool, the completions of all processes that a step takes; None: all.
    """
    config, totals = online.config, dict[str, list[float]]()
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch_size)  # of the rows of all processes
        for number, chunk in enumerate(order.chunk(config.minibatches)):
            chunk = chunk if counted is None else chunk[counted.cpu()[chunk]]
            index, shares = online.own_rows(chunk), online.shares(experience, chunk)
            part, untouched = tuple(x[index] for x in targets), epoch == 0 and number == 0
            metrics = minibatch_update(experience.rollout.rows(index), part, shares, untouched)
            for name, value in metrics.items():
                totals.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in totals.items()}


def of_all(online: Online, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """`function` of the values [B] of all processes, in their order; returns this process's part, [B]."""
    part = online.ranks.part(online.prompts_per_round)
    return function(online.ranks.cat(x))[part.start * online.samples : part.stop * online.samples]


def whiten_all(online: Online, x: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    """`whiten` over the rollouts of all processes. x, mask: of one shape."""
    if online.ranks.size == 1:
        return whiten(x, mask, shift_mean=shift_mean)
    mine = x[mask].double()
    mean = mine.mean() if len(mine) else mine.sum()
    count, mean, squares = merged(online.ranks.gather((len(mine), float(mean), float((mine - mean).square().sum()))))
    white = (x.double() - mean) / math.sqrt((squares / (count - 1) if count > 1 else 0.0) + 1e-8)
    return torch.where(mask, white if shift_mean else white + mean, 0.0).to(torch.promote_types(x.dtype, torch.float32))


def merged(moments: list[tuple[int, float, float]]) -> tuple[int, float, float]:
    """Count, mean and sum of squared deviations of all numbers, from those of their parts (Chan et al. 1979)."""
    count, mean, squares = 0, 0.0, 0.0
    for n, other, more in moments:
        if n:
            apart, both = other - mean, count + n
            mean, squares = mean + apart * n / both, squares + more + apart * apart * count * n / both
            count = both
    return count, mean, squares


def policy_gradient_step(
    online: Online, run: Run, experience: Experience, advantages: Tensor, *, reduction: str = "token_mean"
) -> dict[str, float]:
    """One optimizer step on `reinforce_loss`; the denominator is that of the whole batch of all processes.

    advantages: [B] or [B, T]. reduction: as in `reinforce_loss`.
    """
    rollout, tally = experience.rollout, Tally()
    advantages = experience.weighed(advantages)
    counts, tokens = online.shares(experience, torch.arange(online.config.batch_size))
    total = tokens if reduction == "token_mean" else torch.tensor(online.config.batch_size)
    for rows in training_passes(counts, online.config.micro_batch_size, online.learner):
        part = rollout.rows(rows)
        with run.meter.phase("policy_update"):
            with online.learner.autocast():
                out = online.objectives.reinforce(
                    part.sequences, advantages[rows], kept=part.kept, reduction=reduction, normalizer=total
                )
            online.learner.backward(out.loss)
        tally.add("loss/policy_avg", out.loss)
        online.note_drift(tally, out.logprobs, part)
    with run.meter.phase("optimizer"):
        return take_step(tally, {"grad_norm": online.learner}, online.check_drift)
