"""Variance of policy-gradient estimators on one policy, from the same samples (ReMax paper, sec. 4.1 and Prop. 3).

K batches are sampled from the policy; each gives one gradient per estimator, the mean over its completions of

    sum_t w_t grad log pi(a_t | s_t)        w the per-token weights: the score less a baseline, less the KL penalty

The total variance is the trace of the gradients' covariance, sum_i Var(g_i), with the unbiased estimator over the K
batches. Nothing is trained. Left out: the clipping of ReMax's score difference, which would bias its gradient.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_fast.config import ReMaxConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import remax_returns
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.meter import Meter

Name = TypeVar("Name")


class Moments:
    """Running mean, total variance and mean norm of vectors (Welford), so that K gradients need not be held at once."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares, self.norms = 0, torch.zeros(()), 0.0, 0.0

    def add(self, gradient: Tensor) -> None:
        """Count one more vector [D]."""
        self.n += 1
        delta = gradient - self.mean
        self.mean = self.mean + delta / self.n
        self.squares += torch.dot(delta, gradient - self.mean).item()
        self.norms += gradient.norm().item()

    def summary(self) -> dict[str, float]:
        """{"variance": the total variance, "norm": the mean norm}; needs two vectors or more."""
        return {"variance": self.squares / (self.n - 1), "norm": self.norms / self.n}


@trusts_as_asked
def gradient_variance(config: ReMaxConfig, batches: int) -> dict[str, dict[str, float]]:
    """{"REINFORCE" | "ReMax": {"variance", "norm"}} of the policy `config.model`; nothing is trained or written."""
    online = Online(config, "gradient variance", greedy=True)

    def weights(experience: Experience) -> dict[str, Tensor]:
        baselines = {"REINFORCE": torch.zeros_like(experience.scores), "ReMax": experience.greedy_scores}
        return {name: token_weights(online, experience, b, experience.scores) for name, b in baselines.items()}

    return gradient_moments(online, range(1, batches + 1), weights)


def gradient_moments(
    online: Online, steps: Iterable[int], weights: Callable[[Experience], Mapping[Name, Tensor]]
) -> dict[Name, dict[str, float]]:
    """{name: {"variance", "norm"}} of the estimators that `weights` names, over one batch per number in `steps`.

    steps: the numbers of the rounds whose prompts and random numbers the batches take; at least 2 numbers.
    weights: function from a batch to the per-token weights [B, T] of each estimator.

    Raises ValueError for fewer steps, and for a config with optimizer_in_backward, which would train.
    """
    steps = list(steps)
    if len(steps) < 2:
        raise ValueError(f"batches: expected at least 2, got {len(steps)}")
    if online.config.optimizer_in_backward:
        raise ValueError("optimizer_in_backward: expected false, since nothing may be trained here; got true")
    moments: dict[Name, Moments] = {}
    meter = Meter(online.device)
    for step in steps:
        experience = online.collect(meter, step)
        for name, weights_BT in weights(experience).items():
            moments.setdefault(name, Moments()).add(_gradient(online, experience.rollout, weights_BT))
        meter.step()
    return {name: m.summary() for name, m in moments.items()}


def token_weights(online: Online[ReMaxConfig], experience: Experience, baselines_B: Tensor, scores_B: Tensor) -> Tensor:
    """w [B, T] of scores less baselines, both [B], with the KL penalty and the discount of the config's variant."""
    return remax_returns(
        scores_B,
        baselines_B,
        experience.rollout.logprobs,
        experience.ref_logprobs,
        experience.rollout.response_mask,
        kl_coef=online.kl.coef,
        gamma=online.config.gamma,
        variant=online.config.variant,
    )


def _gradient(online: Online, rollout: Rollout, weights_BT: Tensor) -> Tensor:
    """The gradient of the loss, [D]: minus the estimate of the gradient of the expected score."""
    for rows in micro_batches(len(weights_BT), online.config.micro_batch_size):
        part = rollout.rows(rows)
        with online.learner.autocast():
            out = online.objectives.reinforce(
                part.sequences, weights_BT[rows], kept=part.kept, reduction="sequence_sum", normalizer=len(weights_BT)
            )
        out.loss.backward()
    gradients = [p.grad for p in online.learner.parameters]
    gradient = torch.cat([g.flatten() for g in gradients])  # pyright: ignore[reportOptionalMemberAccess]
    online.policy.zero_grad(set_to_none=True)
    return gradient
