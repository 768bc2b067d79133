"""ReMax (arXiv 2310.10505): REINFORCE whose baseline is the score of the policy's own greedy completion.

There is no value model, and a rollout gets one optimizer step. Sampled and greedy completions decode in one batch. The
variants differ in how KL and discount enter the per-token weights (see `remax_returns`) and in the reduction. The
paper's Algorithm 1 sums over tokens and averages over completions; the authors' code and verl average over tokens.
"""

from collections.abc import Sequence
from functools import partial

from rlhf_fast.config import ReMaxConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import remax_returns
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.updates import policy_gradient_step
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.run import Run


@writes_alone("output_dir")
@trusts_as_asked
def train(config: ReMaxConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by ReMax; the result goes to `config.output_dir`."""
    online = Online(config, "ReMax", greedy=True, greedy_length=config.greedy_response_length)
    online.run(partial(update, online), listeners=listeners)


def update(online: Online[ReMaxConfig], run: Run, experience: Experience) -> dict[str, float]:
    """One optimizer step on a rollout."""
    config = online.config
    assert experience.greedy_scores is not None  # `train` asks for greedy completions
    weights_BT = remax_returns(
        experience.scores,
        experience.greedy_scores,
        experience.rollout.logprobs,
        experience.ref_logprobs,
        experience.rollout.response_mask,
        kl_coef=online.kl.coef,
        gamma=config.gamma,
        clip=config.score_clip or None,
        variant=config.variant,
    )
    reduction = "sequence_sum" if config.variant == "paper" else "token_mean"
    return policy_gradient_step(online, run, experience, weights_BT, reduction=reduction)
