"""RLOO (arXiv 2402.14740): REINFORCE whose baseline is the mean score of the prompt's other samples.

The KL penalty is part of the completion's score: R = score - kl_coef * sum_t k1_t. With `normalize_advantages` the
method is REINFORCE++-baseline (arXiv 2501.03262): whitening takes out the factor k / (k - 1) by which RLOO's advantages
exceed those about the mean of all k samples.
"""

from collections.abc import Sequence

import torch

from rlhf_fast.config import RLOOConfig
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.ops import kl_penalty, rloo_advantages
from rlhf_fast.stages.online import Experience, Online
from rlhf_fast.stages.updates import policy_gradient_step, whiten_all
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.run import Run


@writes_alone("output_dir")
@trusts_as_asked
def train(config: RLOOConfig, *, listeners: Sequence[Listener] = ()) -> None:
    """Trains `config.model` by RLOO; the result goes to `config.output_dir`."""
    online = Online(config, "RLOO", samples=config.group_size)

    def update(run: Run, experience: Experience) -> dict[str, float]:
        rollout = experience.rollout
        kl_BT = kl_penalty(rollout.logprobs, experience.ref_logprobs, "k1")
        kl_B = torch.where(rollout.response_mask, kl_BT, 0.0).sum(dim=1)
        advantages_B = rloo_advantages(experience.scores - online.kl.coef * kl_B, config.group_size)
        if config.normalize_advantages:
            advantages_B = whiten_all(online, advantages_B, torch.ones_like(advantages_B, dtype=torch.bool))
        return policy_gradient_step(online, run, experience, advantages_B)

    online.run(update, listeners=listeners)
