"""Gradient variance of REINFORCE and ReMax on one policy, from the same samples (ReMax paper, sec. 4.1 and Prop. 3).

K batches are sampled from the policy; each gives one gradient per method. The total variance is the trace of the
gradients' covariance, sum_i Var(g_i), with the unbiased estimator over the K batches.
"""

import torch
from torch import Tensor

from rlhf_fast.config import ReMaxConfig
from rlhf_fast.memory import Meter
from rlhf_fast.ops import remax_returns
from rlhf_fast.stages.online import Experience, Online


class _Moments:
    """Running mean and sum of squared deviations of vectors (Welford), so that K gradients need not be held at once."""

    def __init__(self) -> None:
        self.n, self.mean, self.squares, self.norms = 0, torch.zeros(()), torch.zeros(()), 0.0

    def add(self, gradient: Tensor) -> None:
        self.n += 1
        delta = gradient - self.mean
        self.mean = self.mean + delta / self.n
        self.squares = self.squares + delta * (gradient - self.mean)
        self.norms += gradient.norm().item()

    def summary(self) -> dict[str, float]:
        return {"variance": self.squares.sum().item() / (self.n - 1), "norm": self.norms / self.n}


def gradient_variance(config: ReMaxConfig, batches: int) -> dict[str, dict[str, float]]:
    """{"REINFORCE" | "ReMax": {"variance", "norm"}} of the policy `config.model`; nothing is trained or written."""
    if batches < 2:
        raise ValueError(f"batches: expected at least 2, got {batches}")
    if config.optimizer_in_backward:
        raise ValueError("optimizer_in_backward: expected false, since nothing may be trained here; got true")
    online = Online(config, "gradient variance", greedy=True)
    moments = {"REINFORCE": _Moments(), "ReMax": _Moments()}
    meter = Meter(online.device)
    for step in range(1, batches + 1):
        experience = online.collect(meter, step)
        for name, baseline in {
            "REINFORCE": torch.zeros_like(experience.scores),
            "ReMax": experience.greedy_scores,
        }.items():
            moments[name].add(_gradient(online, experience, baseline))
    return {name: m.summary() for name, m in moments.items()}


def _gradient(online: Online, experience: Experience, baseline_B: Tensor) -> Tensor:
    config, rollout = online.config, experience.rollout
    weights_BT = remax_returns(
        experience.scores,
        baseline_B,
        rollout.logprobs,
        experience.ref_logprobs,
        rollout.response_mask,
        kl_coef=config.kl_coef,
        gamma=config.gamma,
        variant=config.variant,
    )
    out = online.objectives.reinforce(rollout.sequences, weights_BT, kept=rollout.kept, reduction="sequence_sum")
    out.loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in online.learner.parameters])
    online.policy.zero_grad(set_to_none=True)
    return gradient
