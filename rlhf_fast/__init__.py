# ruff: noqa: F403, F405  the names come from rlhf_fast.ops, at first use
"""RLHF post-training of language models on one machine: fast, right and measurable.

`rlhf_fast.ppo_loss(...)`, `rlhf_fast.token_logprobs(...)` and the other operations of `rlhf_fast.ops` are importable
from here. They load torch at first use, so that `rlhf-fast --help` need not load it. The stages are in
`rlhf_fast.stages`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rlhf_fast.ops import *  # what editors and type checkers see

__version__ = "0.1.0"

__all__ = [  # the one list of the public names: `rlhf_fast.ops` adds to it
    "GAE",
    "DPOLoss",
    "KTOLoss",
    "LinearDPOLoss",
    "LinearKTOLoss",
    "LinearLoss",
    "LinearPPOLoss",
    "PPOLoss",
    "RankingLoss",
    "RewardLoss",
    "Sample",
    "TokenKL",
    "TokenLogprobs",
    "ValueLoss",
    "discounted_returns",
    "dpo_loss",
    "gae",
    "grpo_advantages",
    "kl_penalty",
    "kto_loss",
    "length_adaptive_lambda",
    "linear_dpo_loss",
    "linear_kto_loss",
    "linear_loss",
    "linear_ppo_loss",
    "linear_reinforce_loss",
    "linear_sft_loss",
    "linear_token_kl",
    "linear_token_logprobs",
    "ppo_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reinforce_loss",
    "remax_returns",
    "reward_loss",
    "rloo_advantages",
    "sample_tokens",
    "shape_rewards",
    "soft_overlong_punishment",
    "token_kl",
    "token_logprobs",
    "whiten",
]


def __getattr__(name: str) -> Any:
    if name != "ops" and name not in __all__:
        raise AttributeError(f"module 'rlhf_fast' has no attribute {name!r}")
    ops = import_module("rlhf_fast.ops")
    globals().update({known: getattr(ops, known) for known in __all__})  # found without this function from now on
    return ops if name == "ops" else globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "ops"})
