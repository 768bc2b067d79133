"""Every operation in plain PyTorch: oracle of the tests, fallback where there is no kernel, baseline of the bench.

Bodies read like the formulas and gradients come from autograd. Statistics are float32, or float64 for float64 input.
Arguments are taken as valid (`rlhf_fast.ops` checks them) and memory is not saved: [N, V] temporaries are fine here.

Shapes: B sequences, T response tokens, V vocabulary, N tokens in any leading shape. Masks are bool, True = counts,
and select with `where`, so that whatever sits at a masked place (NaN included) reaches no value or gradient.
"""

from rlhf_fast.ops.reference.attention import packed_attention
from rlhf_fast.ops.reference.dtypes import at_least_fp32, mean_over, no_autocast
from rlhf_fast.ops.reference.layers import add_rms_norm, rotary, swiglu
from rlhf_fast.ops.reference.policy import MAX_LOG_RATIO, ppo_loss, ppo_value_loss, reinforce_loss
from rlhf_fast.ops.reference.preference import dpo_loss, kto_loss, ranking_loss, reward_loss
from rlhf_fast.ops.reference.rows import (
    IGNORED_ID,
    compute_dtype,
    linear_logits,
    linear_token_kl,
    linear_token_logprobs,
    sample_tokens,
    scaled_logits,
    token_kl,
    token_logprobs,
)
from rlhf_fast.ops.reference.sequences import (
    count_from_end,
    discounted_returns,
    gae,
    grpo_advantages,
    kl_penalty,
    remax_returns,
    rloo_advantages,
    shape_rewards,
    whiten,
)

__all__ = [
    "IGNORED_ID",
    "MAX_LOG_RATIO",
    "add_rms_norm",
    "at_least_fp32",
    "compute_dtype",
    "count_from_end",
    "discounted_returns",
    "dpo_loss",
    "gae",
    "grpo_advantages",
    "kl_penalty",
    "kto_loss",
    "linear_logits",
    "linear_token_kl",
    "linear_token_logprobs",
    "mean_over",
    "no_autocast",
    "packed_attention",
    "ppo_loss",
    "ppo_value_loss",
    "ranking_loss",
    "reinforce_loss",
    "remax_returns",
    "reward_loss",
    "rloo_advantages",
    "rotary",
    "sample_tokens",
    "scaled_logits",
    "shape_rewards",
    "swiglu",
    "token_kl",
    "token_logprobs",
    "whiten",
]
