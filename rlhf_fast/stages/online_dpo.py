"""Online DPO (arXiv 2402.04792): DPO on pairs that the policy samples itself and that a reward labels.

Each prompt gets two samples. The sample with the higher score is chosen, the other is rejected. As in RLOO, kl_coef
times the completion's KL to the reference is taken off the score. Two equal scores tell no preference, so their pair is
left out. A rollout gets one optimizer step; the denominator is the number of pairs with a preference.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_fast.config import OnlineDPOConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import kl_penalty
from rlhf_fast.rollout.generate import Rollout
from rlhf_fast.stages.dpo import pair_options
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.training.learner import take_step, training_passes
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.run import Run
from rlhf_fast.training.tally import Tally


@writes_alone("output_dir")
@trusts_as_asked
def train(config: OnlineDPOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by online DPO; the result goes to `config.output_dir`."""
    online = Online(config, "online DPO", samples=2)

    def update(run: Run, experience: Experience) -> dict[str, float]:
        rollout = experience.rollout
        kl_BT = kl_penalty(rollout.logprobs, experience.ref_logprobs, "k1")
        kl_B = torch.where(rollout.response_mask, kl_BT, 0.0).sum(dim=1)
        chosen, rejected = preferred(experience.scores - online.kl.coef * kl_B)
        refs_B = torch.where(rollout.response_mask, experience.ref_logprobs, 0.0).sum(dim=1)
        return step(online, run, rollout, refs_B, chosen, rejected)

    online.run(update, listeners=listeners)


def preferred(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of the chosen and of the rejected samples, int64. scores: [2 P], two consecutive scores per prompt."""
    pairs_P2 = scores.view(-1, 2)
    best_P = pairs_P2.argmax(dim=1)
    first_P = torch.arange(0, len(scores), 2, device=scores.device)
    decided = pairs_P2[:, 0] != pairs_P2[:, 1]
    return (first_P + best_P)[decided], (first_P + 1 - best_P)[decided]


def step(
    online: Online[OnlineDPOConfig],
    run: Run,
    rollout: Rollout,
    refs_B: Tensor,
    chosen: Tensor,
    rejected: Tensor,
) -> dict[str, float]:
    """One optimizer step on `dpo_loss` of the rows `chosen` and `rejected`.

    refs_B: the reference's log-probs, summed over each completion.
    """
    config, tally = online.config, Tally()
    told = online.ranks.gather((len(chosen), int(rollout.response_mask[chosen].sum())))
    counts, lengths = zip(*told, strict=True)
    pairs, tokens = sum(counts), sum(lengths)  # of all processes
    mean_length = tokens / max(pairs, 1) or 1.0
    size = None if config.micro_batch_size is None else config.micro_batch_size // 2
    tally.add("pairs", len(chosen))
    for rows in training_passes(counts, size, online.learner):
        index = torch.cat([chosen[rows], rejected[rows]])
        part = rollout.rows(index)
        lengths = part.response_mask.sum(dim=1)
        with run.meter.phase("policy_update"):
            with online.learner.autocast():
                out = online.objectives.dpo(
                    part.sequences,
                    refs_B[index].chunk(2),
                    pairs,
                    kept=part.kept,
                    mean_chosen_length=mean_length,
                    **pair_options(config),
                    chosen_lengths=lengths[: len(index) // 2],
                    rejected_lengths=lengths[len(index) // 2 :],
                )
            online.learner.backward(out.loss)
        margins = out.chosen_rewards - out.rejected_rewards
        tally.add("loss/policy_avg", out.loss)
        tally.add("rewards/margins", margins.mean().double() * len(margins) / pairs)
        tally.add("rewards/accuracies", (margins > 0).float().mean().double() * len(margins) / pairs)
        logps = torch.cat([out.chosen_logps, out.rejected_logps])
        online.note_mean_drift(tally, logps, part)
    with run.meter.phase("optimizer"):
        return take_step(tally, {"grad_norm": online.learner}, online.check_drift)
