"""GRPO (arXiv 2402.03300, eq. 3): no value model; the advantage is the score, whitened within its prompt's group.

    loss = -1/B sum_i 1/|o_i| sum_t {min(rho A_i, clip(rho, 1 - eps, 1 + eps) A_i) - beta KL_t},
    KL_t = e^(log ref - log pi) - 1 - (log ref - log pi)   (k3)

The KL to the reference is a term of the loss, not of the reward. Every completion weighs the same, whatever its length.
These are the defaults. `loss_type` and the options beside it make Dr. GRPO, DAPO, GSPO, CISPO and SAPO of them
(`stages.clipped`). Left out: the iterative variant, which also trains the reward model.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from rlhf_fast.config import GRPOConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import grpo_advantages
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.clipped import denominator, loss_options, scores_less_kl
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.shares import Shares
from rlhf_fast.stages.updates import of_all, several_epochs
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
        advantages_B = of_all(
            online,
            scores_less_kl(online, experience),
            lambda scores: grpo_advantages(scores, config.group_size, scale_rewards=config.scale_rewards),
        )
        assert experience.everyone is not None  # `run` has exchanged it
        lengths, finished = experience.everyone
        counted = finished if config.mask_truncated_completions else None
        tokens = (lengths if counted is None else lengths[counted]).sum()  # of the round
        targets = (experience.weighed(advantages_B), experience.ref_logprobs)
        one_step = partial(minibatch_update, run, online, tokens)
        return several_epochs(online, experience, targets, one_step, counted=counted)

    online.run(update, listeners=listeners)


def minibatch_update(
    run: Run,
    online: Online[GRPOConfig],
    round_tokens: Tensor,
    rollout: Rollout,
    targets: tuple[Tensor, ...],
    shares: Shares,
    untouched: bool,
) -> dict[str, float]:
    """One optimizer step on the loss that the config names.

    round_tokens: of the whole rollout of all processes. targets: advantages [B] or [B, T] and the reference's log-probs
    [B, T]. shares, untouched: as in `several_epochs`.
    """
    config, (advantages, ref_logprobs_BT) = online.config, targets
    tokens, tally = shares.tokens, Tally()
    for rows in training_passes(shares.rows, config.micro_batch_size, online.learner):
        part = rollout.rows(rows)
        with run.meter.phase("policy_update"):
            with online.learner.autocast():
                out = online.objectives.ppo(
                    part.sequences,
                    part.logprobs,
                    advantages[rows],
                    kept=part.kept,
                    normalizer=denominator(online, tokens, round_tokens),
                    **loss_options(online, advantages[rows], ref_logprobs_BT[rows]),
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
