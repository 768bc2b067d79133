"""What corrects for a sampler whose log-probs are not training's, and how far the two are apart.

A token is drawn from mu, the sampler's policy, and trained as if it came from pi, the same weights in training's own
passes. With rho = pi / mu of a token, or of a whole completion, its policy loss gets a weight, a constant of the loss:

    token_truncate      min(rho_t, C)                  truncated importance sampling (arXiv 1802.01561, section 4.1)
    token_mask          rho_t if 1/C <= rho_t <= C, else 0     IcePop (arXiv 2510.18855)
    sequence_truncate   min(prod_t rho_t, C)           at each token of the completion
    sequence_mask       prod_t rho_t if it is <= C, else 0     masked importance sampling (arXiv 2510.26788)

C is `mismatch_cap`. Without the cut, sequence weights make the gradient unbiased; the cut bounds their variance.
arXiv 2510.26788 compares these weights. The weights are no part of the KL penalty and of the value loss.

Where a server samples a round ahead, mu is the policy before the last update. The same weights correct for that too:
rho then holds the update beside the engines' rounding. A clipped loss keeps its ratio to pi, the policy at the start of
the round (the decoupled objective of arXiv 2110.00641, equation 3).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_fast.config import OnlineConfig
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.stopped import Diverged
from rlhf_fast.training.tally import Tally

MEAN = "mismatch/mean"
_LARGEST = 30.0  # log of the largest ratio in the effective sample size; e^30 squared is still a float64


def rescored(rollout: Rollout, objectives: Objectives, rows: int | None) -> Rollout:
    """The rollout of another engine with our own log-probs and entropies; its own stay as `sampler_logprobs`.

    rows: of a forward pass. Kept sets are not known of another engine.
    """
    parts = [
        objectives.logprobs(part.sequences) for part in map(rollout.rows, micro_batches(len(rollout.finished), rows))
    ]
    return rollout._replace(
        logprobs=torch.cat([part.logprobs for part in parts]),
        entropy=torch.cat([part.entropy for part in parts]),
        sampler_logprobs=rollout.logprobs,
    )


def weights(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, mode: str, cap: float) -> Tensor | None:
    """The weight of each token's policy loss [B, T] fp32, 0 at masked places; None for the mode `none`.

    logprobs, sampler_logprobs: [B, T], log pi and log mu of the tokens. mask: [B, T] bool. cap: C, at least 1.
    """
    if mode == "none":
        return None
    log_BT, bound = _log_ratios(logprobs, sampler_logprobs, mask, mode), math.log(cap)
    if mode.endswith("truncate"):
        out_BT = log_BT.clamp(max=bound).exp()
    else:
        low = -bound if mode == "token_mask" else -math.inf
        inside_BT = (log_BT >= low) & (log_BT <= bound)
        out_BT = torch.where(inside_BT, log_BT.clamp(max=bound).exp(), 0.0)
    return torch.where(mask, out_BT, 0.0).float()


def _log_ratios(logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, mode: str) -> Tensor:
    """log rho [B, T] in float64: of the token, or of the whole completion at each of its tokens."""
    log_BT = torch.where(mask, logprobs.detach().double() - sampler_logprobs.double(), 0.0)
    return log_BT if not mode.startswith("sequence") else log_BT.sum(dim=1, keepdim=True).expand_as(log_BT)


class Correction(NamedTuple):
    """What a run does about its sampler's log-probs."""

    mode: str
    cap: float
    bound: float  # nats a token on average, beyond which the run stops
    ahead: int = 0  # rounds by which the server's weights are older

    def weights(self, rollout: Rollout) -> Tensor | None:
        """The weights of a rollout's tokens [B, T] fp32, or None."""
        if rollout.sampler_logprobs is None:
            return None
        return weights(rollout.logprobs, rollout.sampler_logprobs, rollout.response_mask, self.mode, self.cap)

    def note(self, tally: Tally, rollout: Rollout, used: Tensor | None) -> None:
        """Tallies the differences of a rollout, for `describe`. used: its `weights`."""
        if rollout.sampler_logprobs is None:
            return
        mask = rollout.response_mask
        log_BT = _log_ratios(rollout.logprobs, rollout.sampler_logprobs, mask, "token")
        tally.add(MEAN, log_BT.abs().sum())
        tally.raise_to("mismatch/max", log_BT.abs().max())
        tally.add("mismatch/kl", torch.where(mask, log_BT.clamp(max=_LARGEST).expm1() - log_BT, 0.0).sum())
        sequence = self.mode.startswith("sequence")
        log_N = log_BT.sum(dim=1) if sequence else log_BT[mask]
        ratio_N = log_N.clamp(max=_LARGEST).exp()
        for name, value in (("sum", ratio_N.sum()), ("squares", ratio_N.square().sum()), ("number", len(ratio_N))):
            tally.add(f"ess/{name}", value)
        tally.add("mismatch/tokens", mask.sum())
        if used is not None:
            changed = (
                used - _log_ratios(rollout.logprobs, rollout.sampler_logprobs, mask, self.mode).exp()
            ).abs() > 1e-4
            tally.add("mismatch/cut", (changed & mask).sum())

    def describe(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step with means in place of the sums of `note`.

        mismatch/mean and mismatch/max: |log pi - log mu| in nats a token. mismatch/kl: KL(mu || pi) in nats a token, by
        the estimate rho - 1 - log rho (k3), which is never negative. mismatch/ess: (sum rho)^2 / (N sum rho^2), the
        effective sample size of the tokens, or of the completions where weights are those of completions.
        mismatch/cut: the part of the tokens whose weight the cap has changed.
        """
        if MEAN not in metrics:
            return metrics
        tokens = max(1.0, metrics.pop("mismatch/tokens"))
        for name in (MEAN, "mismatch/kl", "mismatch/cut"):
            if name in metrics:
                metrics[name] /= tokens
        total, squares, number = (metrics.pop(f"ess/{name}") for name in ("sum", "squares", "number"))
        metrics["mismatch/ess"] = total**2 / (number * squares) if squares else 0.0
        return metrics

    def check(self, metrics: dict[str, float]) -> None:
        """Diverged where the mean difference is beyond its bound, or is no number."""
        if MEAN not in metrics or metrics[MEAN] <= self.bound:
            return
        if self.ahead:
            raise Diverged(
                f"the log-probs of the vLLM server's round and of training differ by {metrics[MEAN]:.3g} nats a token, "
                f"more than max_mismatch={self.bound:g}; one update moves the policy too far to sample a round ahead",
                remedy="a lower learning_rate, rollouts_ahead 0, or a larger max_mismatch",
            )
        raise Diverged(
            f"the log-probs of the vLLM server and of training differ by {metrics[MEAN]:.3g} nats a token, more "
            f"than max_mismatch={self.bound:g}; the server samples from another policy",
            remedy="a server of the policy's data type, or a larger max_mismatch",
        )


def correction_of(config: OnlineConfig) -> Correction:
    """What `config` asks for."""
    return Correction(config.correction, config.mismatch_cap, config.max_mismatch, config.rollouts_ahead)
