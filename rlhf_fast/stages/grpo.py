"""GRPO (arXiv 2402.03300, eq. 3): no value model; the advantage is the score, whitened within its prompt's group.

    loss = -1/B sum_i 1/|o_i| sum_t {min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL_t},
    KL_t = e^(log ref - log pi) - 1 - (log ref - log pi)   (k3)

The KL to the reference is a term of the loss, not of the reward. Every completion weighs the same, whatever its length.
Left out: the iterative variant, which also trains the reward model.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_fast.config import GRPOConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import grpo_advantages
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.updates import several_epochs
from rlhf_fast.training.batches import micro_batches
from rlhf_fast.training.learner import take_step, training_passes
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


@writes_alone("output_dir")
@trusts_as_asked
def train(config: GRPOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by GRPO; the result goes to `config.output_dir`."""
    updates = config.epochs * config.minibatches
    online = Online(config, "GRPO", samples=config.group_size, updates_per_round=updates)

    def update(run: Run, experience: Experience) -> dict[str, float]:
        advantages_B = grpo_advantages(experience.scores, config.group_size)
        targets = (experience.weighed(advantages_B), experience.ref_logprobs)
        return several_epochs(online, experience, targets, partial(minibatch_update, run, online))

    online.run(update, listeners=listeners)


def minibatch_update(
    run: Run, online: Online[GRPOConfig], rollout: Rollout, targets: tuple[Tensor, ...], untouched: bool
) -> dict[str, float]:
    """One optimizer step on the clipped loss with its KL term; the denominator is the number of completions.

    targets: advantages [B] or [B, T] and the reference's log-probs [B, T]. untouched: as in `several_epochs`.
    """
    config, (advantages_B, ref_logprobs_BT) = online.config, targets
    counts = torch.stack([torch.tensor(len(advantages_B), device=online.device), rollout.response_mask.sum()])
    completions, tokens = online.ranks.sum(counts)  # of all processes
    tally = Tally()
    for rows in training_passes(micro_batches(len(advantages_B), config.micro_batch_size), online.learner):
        part = rollout.rows(rows)
        with run.meter.phase("policy_update"):
            with online.learner.autocast():
                out = online.objectives.ppo(
                    part.sequences,
                    part.logprobs,
                    advantages_B[rows],
                    kept=part.kept,
                    clip=config.clip,
                    ref_logprobs=ref_logprobs_BT[rows],
                    kl_coef=online.kl.coef,
                    kl_estimator="k3",
                    reduction="sequence_mean",
                    normalizer=completions,
                )
            online.learner.backward(out.loss)
        if untouched:
            online.note_drift(tally, out.logprobs, part)
        share = (part.response_mask.sum() / tokens).double()
        tally.add("loss/policy_avg", out.loss)
        tally.add("policy/clipfrac_avg", share * out.clip_fraction)
        tally.add("policy/approxkl_avg", share * out.approx_kl)
        tally.add("val/ratio", share * out.ratio_mean)
    with run.meter.phase("optimizer"):
        return take_step(tally, {"grad_norm": online.learner}, online.check_drift)
