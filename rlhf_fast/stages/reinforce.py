"""REINFORCE (Williams 1992) without a baseline. ReMax is this method with a greedy baseline.

The per-token weights are ReMax's with a baseline of 0, so that the two methods differ in nothing else. With `kl_to_go`
and `normalize_advantages` the method is REINFORCE++ (arXiv 2501.03262, eq. 9), whose baseline is the mean of the batch.
"""

from collections.abc import Sequence

import torch

from rlhf_fast.config import ReinforceConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import remax_returns
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.updates import policy_gradient_step, whiten_all
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.run import Run


@writes_alone("output_dir")
@trusts_as_asked
def train(config: ReinforceConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by REINFORCE; the result goes to `config.output_dir`."""
    online = Online(config, "REINFORCE")

    def update(run: Run, experience: Experience) -> dict[str, float]:
        weights_BT = remax_returns(
            experience.scores,
            torch.zeros_like(experience.scores),
            experience.rollout.logprobs,
            experience.ref_logprobs,
            experience.rollout.response_mask,
            kl_coef=online.kl.coef,
            gamma=config.gamma,
            variant="verl" if config.kl_to_go else "official",
        )
        if config.normalize_advantages:
            weights_BT = whiten_all(online, weights_BT, experience.rollout.response_mask)
        return policy_gradient_step(online, run, experience, weights_BT)

    online.run(update, listeners=listeners)
