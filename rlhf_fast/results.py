"""What the operations return. Losses are differentiable, everything else beside them is detached."""

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    logprobs: Tensor
    entropy: Tensor


class TokenKL(NamedTuple):
    logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    ref_logprobs: Tensor


class Sample(NamedTuple):
    tokens: Tensor
    logprobs: Tensor
    entropy: Tensor
    full_logprobs: Tensor
    kept: Tensor | None


class GAE(NamedTuple):
    advantages: Tensor
    returns: Tensor


class PPOLoss(NamedTuple):
    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    policy_loss: Tensor
    kl: Tensor
    entropy: Tensor

    @classmethod
    def of(cls, loss: Tensor, stats: Tensor) -> "PPOLoss":
        """From the [8] statistics in a kernel's order."""
        _, policy_loss, clip_fraction, approx_kl, ratio_mean, ratio_max, kl, entropy = stats.unbind()
        return cls(loss, clip_fraction, approx_kl, ratio_mean, ratio_max, policy_loss, kl, entropy)


class LinearPPOLoss(NamedTuple):
    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    policy_loss: Tensor
    kl: Tensor
    entropy: Tensor
    logprobs: Tensor
    token_entropy: Tensor


class LinearLoss(NamedTuple):
    loss: Tensor
    logprobs: Tensor
    entropy: Tensor


class ValueLoss(NamedTuple):
    loss: Tensor
    clip_fraction: Tensor


class RewardLoss(NamedTuple):
    loss: Tensor
    accuracy: Tensor
    margin: Tensor
    bt_loss: Tensor


class RankingLoss(NamedTuple):
    loss: Tensor
    accuracy: Tensor


class DPOLoss(NamedTuple):
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor


class LinearDPOLoss(NamedTuple):
    loss: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
