"""RLHF post-training of language models on one machine: fast, right and measurable.

`rlhf_fast.ppo_loss(...)`, `rlhf_fast.token_logprobs(...)` and the other operations of `rlhf_fast.ops` are importable
from here; they load torch at first use, so that `rlhf-fast --help` need not. The stages live in `rlhf_fast.stages`.
"""

from typing import Any

__version__ = "0.1.0"

__all__ = [
    "GAE",
    "DPOLoss",
    "PPOLoss",
    "RankingLoss",
    "RewardLoss",
    "Sample",
    "TokenLogprobs",
    "ValueLoss",
    "discounted_returns",
    "dpo_loss",
    "gae",
    "grpo_advantages",
    "kl_penalty",
    "ppo_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reinforce_loss",
    "remax_returns",
    "reward_loss",
    "rloo_advantages",
    "sample_tokens",
    "shape_rewards",
    "token_logprobs",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from rlhf_fast import ops

        return getattr(ops, name)
    raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
