"""What PPO and GRPO share: the policy loss that a config names, its denominator, and the KL in the reward.

    loss_type            term of a token    sum over tokens / denominator
    grpo, sapo           clip, sapo         each completion's mean / completions
    luspo                clip               completions
    dr_grpo              clip               completions * max_response_length
    bnpo                 clip               tokens of the minibatch
    dapo, cispo          clip, cispo        tokens of the rollout / minibatches of a pass

Completions and tokens are those of all processes. The names and denominators are TRL's.
"""

from typing import Any

import torch
from torch import Tensor

from rlhf_fast.config import ClippedConfig
from rlhf_fast.ops import kl_penalty
from rlhf_fast.stages.online import Experience, Online

_REDUCTIONS = {"grpo": "sequence_mean", "sapo": "sequence_mean", "luspo": "sequence_sum", "dr_grpo": "constant"}


def denominator(online: Online[Any], minibatch_tokens: Tensor, round_tokens: Tensor) -> Tensor:
    """The denominator of a minibatch's policy loss, 0-dim; both arguments count the tokens of all processes."""
    config: ClippedConfig = online.config
    if config.loss_type == "bnpo":
        return minibatch_tokens
    if config.loss_type in ("dapo", "cispo"):
        return round_tokens / config.minibatches
    longest = config.max_response_length if config.loss_type == "dr_grpo" else 1
    return torch.tensor(float(config.rows_per_step * longest), device=online.device)


def loss_options(online: Online[Any], advantages: Tensor, ref_logprobs: Tensor) -> dict[str, Any]:
    """The options of `ppo_loss` that a config asks for, without the denominator.

    advantages: [B] or [B, T]. Of [B, T], where another engine has sampled, each token keeps its own weight.
    ref_logprobs: [B, T], read where the KL is in the loss.
    """
    config: ClippedConfig = online.config
    level = config.importance_sampling_level
    if level == "sequence" and advantages.dim() == 2:
        level = "sequence_token"
    options: dict[str, Any] = {
        "importance_sampling_level": level,
        "reduction": _REDUCTIONS.get(config.loss_type, "token_mean"),
    }
    if config.loss_type == "cispo":
        options |= {"objective": "cispo", "clip": config.clip_high}
    elif config.loss_type == "sapo":
        temperatures = config.sapo_temperature_pos, config.sapo_temperature_neg
        options |= {"objective": "sapo", "sapo_temperature": temperatures}
    else:
        high = config.clip if config.clip_high is None else config.clip_high
        options |= {"clip": (config.clip, high), "dual_clip": config.delta}
    if config.kl_in == "loss":
        options |= {
            "ref_logprobs": ref_logprobs,
            "kl_coef": online.kl.coef,
            "kl_estimator": config.estimator,
            "use_bias_correction_kl": config.use_bias_correction_kl,
        }
    return options


def scores_less_kl(online: Online[Any], experience: Experience) -> Tensor:
    """Scores [B], less kl_coef times the completion's KL where the KL is in the reward."""
    config: ClippedConfig = online.config
    if config.kl_in == "loss":
        return experience.scores
    rollout = experience.rollout
    kl_BT = kl_penalty(rollout.logprobs, experience.ref_logprobs, config.estimator)
    return experience.scores - online.kl.coef * torch.where(rollout.response_mask, kl_BT, 0.0).sum(dim=1)
