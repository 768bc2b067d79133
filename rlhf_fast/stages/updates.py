"""The updates of the online methods: a plain policy-gradient step, or several epochs of minibatches on a rollout."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.config import ClippedConfig
from rlhf_fast.ops import whiten
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.learner import take_step, training_passes
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally

Clipped = TypeVar("Clipped", bound=ClippedConfig)


def several_epochs(
    online: Online[Clipped],
    experience: Experience,
    targets: tuple[Tensor, ...],
    minibatch_update: Callable[[Rollout, tuple[Tensor, ...], bool], dict[str, float]],
    *,
    counted: Tensor | None = None,
) -> dict[str, float]:
    """config.epochs passes over a rollout in config.minibatches steps each; returns the mean of the steps' metrics.

    targets: tensors with a row for each row of the rollout.
    minibatch_update: takes one optimizer step on the rows of `(rollout, targets, untouched)`. untouched: True while the
        policy is still the policy that sampled.
    counted: [B] bool, the rows of the rollout that a step takes; None: all.
    """
    config, totals = online.config, dict[str, list[float]]()
    for epoch in range(config.epochs):
        order = torch.randperm(config.batch_size)  # of the rows of all processes
        for number, chunk in enumerate(order.chunk(config.minibatches)):
            index = online.own_rows(chunk)
            index = index if counted is None else index[counted[index]]
            part = tuple(x[index] for x in targets)
            metrics = minibatch_update(experience.rollout.rows(index), part, epoch == 0 and number == 0)
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
    parts = online.ranks.gather(x[mask].cpu())
    every = torch.cat(parts).to(x.device)
    whitened = whiten(every, torch.ones_like(every, dtype=torch.bool), shift_mean=shift_mean)
    mine = whitened.split([len(part) for part in parts])[online.ranks.rank]
    return torch.zeros_like(x, dtype=whitened.dtype).masked_scatter(mask, mine)


def policy_gradient_step(
    online: Online, run: Run, experience: Experience, advantages: Tensor, *, reduction: str = "token_mean"
) -> dict[str, float]:
    """One optimizer step on `reinforce_loss`; the denominator is that of the whole batch of all processes.

    advantages: [B] or [B, T]. reduction: as in `reinforce_loss`.
    """
    rollout, tally = experience.rollout, Tally()
    advantages = experience.weighed(advantages)
    tokens = online.ranks.sum(rollout.response_mask.sum())
    total = tokens if reduction == "token_mean" else torch.tensor(online.config.batch_size)
    parts = micro_batches(len(advantages), online.config.micro_batch_size)
    for rows in training_passes(parts, online.learner):
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
