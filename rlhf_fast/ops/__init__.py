# ruff: noqa: F401  the imports are what is exported; their names stand in rlhf_fast.__all__
"""The operations: pure functions on tensors, each a `torch.library` operator over a kernel, or the reference.

Every function takes tensors on any device, float32, bfloat16 or float16 (float64 runs the same kernels in float64),
of any strides, and returns float32 statistics; masks are bool, True = counts. Errors are `ValueError`.
"""

import rlhf_fast
from rlhf_fast.ops.dispatch import CUDA, TRITON, backend
from rlhf_fast.ops.dpo import dpo_loss
from rlhf_fast.ops.groups import grpo_advantages, rloo_advantages
from rlhf_fast.ops.kl import kl_penalty, shape_rewards
from rlhf_fast.ops.kto import kto_loss
from rlhf_fast.ops.lengths import length_adaptive_lambda, soft_overlong_punishment
from rlhf_fast.ops.linear import linear_token_logprobs
from rlhf_fast.ops.linear_kl import linear_token_kl
from rlhf_fast.ops.linear_kto import linear_kto_loss
from rlhf_fast.ops.linear_loss import linear_loss
from rlhf_fast.ops.linear_losses import linear_dpo_loss, linear_ppo_loss, linear_reinforce_loss, linear_sft_loss
from rlhf_fast.ops.logprobs import token_logprobs
from rlhf_fast.ops.policy_loss import ppo_loss, ppo_value_loss, reinforce_loss
from rlhf_fast.ops.preference import ranking_loss, reward_loss
from rlhf_fast.ops.results import (
    GAE,
    DPOLoss,
    KTOLoss,
    LinearDPOLoss,
    LinearKTOLoss,
    LinearLoss,
    LinearPPOLoss,
    PPOLoss,
    RankingLoss,
    RewardLoss,
    Sample,
    TokenKL,
    TokenLogprobs,
    ValueLoss,
)
from rlhf_fast.ops.returns import discounted_returns, gae, remax_returns, whiten
from rlhf_fast.ops.sampling import sample_tokens
from rlhf_fast.ops.token_kl import token_kl

if CUDA:
    from rlhf_fast.ops.backends import cuda  # registers its kernels

__all__ = ["backend"]
__all__ += rlhf_fast.__all__  # the one list of the public names, which torch-free code can read

if TRITON:  # registers its implementations; elsewhere Triton's import would cost half a second for nothing
    from rlhf_fast.ops.backends import triton, triton_rows
