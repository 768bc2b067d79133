"""What the operations return. Losses are differentiable, everything else beside them is detached.

B sequences of T tokens, N rows, [...] the shape of the token ids. Statistics are float32, float64 where an input is.
Masked places hold 0 and count nowhere.
"""

from typing import NamedTuple

from torch import Tensor


class TokenLogprobs(NamedTuple):
    """Both differentiable."""

    logprobs: Tensor  # [...], of the given token ids
    entropy: Tensor  # [...], of the distribution over the vocabulary, nats


class TokenKL(NamedTuple):
    """The first three differentiable."""

    logprobs: Tensor  # [...], of the given token ids
    entropy: Tensor  # [...], of the policy's distribution, nats
    kl: Tensor  # [...], KL(policy || reference) over the vocabulary, nats
    ref_logprobs: Tensor  # [...], of the token ids under the reference


class Sample(NamedTuple):
    """One token drawn for each of N rows; all detached."""

    tokens: Tensor  # [N] int64
    logprobs: Tensor  # [N], under the distribution that was drawn from
    entropy: Tensor  # [N], of that distribution, nats
    full_logprobs: Tensor  # [N], under the softmax over the whole vocabulary, at the temperature
    kept: Tensor | None  # [N, ceil(V / 8)] uint8, the tokens that top_k and top_p kept, as bits; None: all


class GAE(NamedTuple):
    """Generalised advantage estimates; detached."""

    advantages: Tensor  # [B, T]
    returns: Tensor  # [B, T], advantages + values


class PPOLoss(NamedTuple):
    """All 0-dim. r = p / p_old of a token; the first, policy_loss, kl and entropy are reduced as `reduction` says."""

    loss: Tensor  # policy_loss + kl_coef kl - entropy_coef entropy
    clip_fraction: Tensor  # share of True tokens whose clipped branch is the larger
    approx_kl: Tensor  # mean of r - 1 - log r over the True tokens
    ratio_mean: Tensor  # of r, over the True tokens
    ratio_max: Tensor
    policy_loss: Tensor  # the clipped objective alone
    kl: Tensor  # estimate of the KL to the reference; 0 where none is given
    entropy: Tensor  # 0 where none is given

    @classmethod
    def of(cls, loss: Tensor, stats: Tensor) -> "PPOLoss":
        """From the [8] statistics in a kernel's order."""
        _, policy_loss, clip_fraction, approx_kl, ratio_mean, ratio_max, kl, entropy = stats.unbind()
        return cls(loss, clip_fraction, approx_kl, ratio_mean, ratio_max, policy_loss, kl, entropy)


class LinearPPOLoss(NamedTuple):
    """PPOLoss, and what the pass over the hidden states has computed for each token."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    policy_loss: Tensor
    kl: Tensor
    entropy: Tensor
    logprobs: Tensor  # [B, T]
    token_entropy: Tensor  # [B, T]


class LinearLoss(NamedTuple):
    """A loss from hidden states, and the log-prob and the entropy of each token, detached."""

    loss: Tensor  # 0-dim
    logprobs: Tensor  # [...], of the given token ids
    entropy: Tensor  # [...], nats


class ValueLoss(NamedTuple):
    """The value loss, and how often its clipping mattered."""

    loss: Tensor  # 0-dim
    clip_fraction: Tensor  # 0-dim, share of True tokens whose clipped square is the larger


class RewardLoss(NamedTuple):
    """All 0-dim, means over the pairs."""

    loss: Tensor  # bt_loss and the centring term
    accuracy: Tensor  # share of pairs with the chosen answer ahead, ties half
    margin: Tensor  # mean of chosen score - rejected score
    bt_loss: Tensor  # Bradley-Terry's part of the loss


class RankingLoss(NamedTuple):
    """The loss of a reward model on ranked answers, and its accuracy."""

    loss: Tensor  # 0-dim, mean over the pairs of answers with different ranks
    accuracy: Tensor  # 0-dim, share of these pairs in the right order, ties half


class DPOLoss(NamedTuple):
    """A loss for each of B pairs; the rewards are detached."""

    losses: Tensor  # [B], differentiable
    chosen_rewards: Tensor  # [B], implicit: beta times the log-prob's gain over the reference
    rejected_rewards: Tensor  # [B]


class KTOLoss(NamedTuple):
    """A loss for each of B answers; the rewards are detached."""

    losses: Tensor  # [B], differentiable
    rewards: Tensor  # [B], implicit: beta times the log-prob's gain over the reference


class LinearDPOLoss(NamedTuple):
    """DPOLoss from hidden states: its mean is differentiable, the rest detached."""

    loss: Tensor  # 0-dim, mean of losses
    losses: Tensor  # [B]
    chosen_rewards: Tensor  # [B], as DPOLoss has them
    rejected_rewards: Tensor  # [B]
    chosen_logps: Tensor  # [B], of whole completions
    rejected_logps: Tensor  # [B]


class LinearKTOLoss(NamedTuple):
    """KTOLoss from hidden states: its mean is differentiable, the rest detached."""

    loss: Tensor  # 0-dim, mean of losses
    losses: Tensor  # [B]
    rewards: Tensor  # [B], as KTOLoss has them
    logps: Tensor  # [B], of whole answers
