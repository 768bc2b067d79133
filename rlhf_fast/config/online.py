"""The configs of the methods that sample from their policy; `stages` says how configs are built.

`clipped` has PPO's and GRPO's, which make several updates of each rollout.
"""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_fast.config.fields import arg, check, check_reward_weights, required
from rlhf_fast.config.sampling import Mismatch
from rlhf_fast.config.stages import (
    BETA_HELP,
    CPO_ALPHA,
    CPO_ALPHA_HELP,
    DPO_LOSS_HELP,
    FUSED_HEAD_HELP,
    LABEL_SMOOTHING_HELP,
    LOSS_WEIGHTS_HELP,
    SIMPO_GAMMA,
    SIMPO_GAMMA_HELP,
    DPOLossType,
    MethodConfig,
    check_pair_losses,
)

__all__ = [
    "OnlineConfig",
    "OnlineDPOConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforceConfig",
]

CAP = 2.0  # of the weights that correct for the sampler
RemaxVariant = Literal["official", "paper", "verl"]


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(MethodConfig):
    """What every method takes that samples from its policy."""

    train_data: str = required("Rows with a prompt column; extra columns go to a Python reward function.")
    reward: str | list[str] = required(
        "Reward-model directory, or a function `package.module:name` or `file.py:name`; repeated: their sum."
    )
    reward_weights: list[float] | None = arg(None, "Weight of each of several rewards; default: 1 for each.")
    eval_reward: str | None = arg(None, "Reward for evaluation only (a ground truth, say); default: `reward`.")
    steps: int = arg(100, "Rollout + update rounds.", at_least=1)
    batch_size: int = arg(32, "Sampled completions per round.", at_least=1)
    micro_batch_size: int | None = arg(
        None, "Completions per forward pass; default: as many as the batch allows.", at_least=1
    )
    fused_head: bool = arg(
        True,
        f"{FUSED_HEAD_HELP} With top_k or top_p losses always come from logits, "
        "because a training pass then needs the set that each token was drawn from (V / 8 bytes a token).",
    )
    kl_coef: float = arg(0.05, "Weight of the per-token KL penalty in the reward (k1 estimate).", at_least=0)
    kl_target: float | None = arg(
        None, "Adapt kl_coef towards this KL per completion in nats; default: fixed.", above=0
    )
    kl_horizon: float = arg(
        10_000, "kl_coef moves by 20 % over so many completions while the KL is 20 % or more off kl_target.", above=0
    )
    share_base: bool = arg(
        False, "Reward (and value) model as adapters on the policy's base: one frozen model for all; needs lora_rank."
    )
    offload: bool = arg(False, "Reference and reward model wait in CPU memory for their phase; no effect on a CPU.")
    missing_eos_penalty: float = arg(0.0, "Subtracted from the score of a completion that never ends.")
    soft_punish_cache: int = arg(
        0, "The score falls by up to 1 over so many last tokens before max_response_length (DAPO); 0: no.", at_least=0
    )
    max_logprob_drift: float | None = arg(
        None,
        "Stop where a token's log-probs of decoding and of training differ by more; default: 0.01; in bf16 the mean "
        "difference of the tokens may be 0.1.",
        at_least=0,
        infinite=True,
    )
    mismatch: Mismatch | None = arg(
        None,
        "Weights that correct for a server's log-probs; default: token_truncate (online DPO: none).",
    )
    mismatch_cap: float = arg(CAP, "These weights are cut to this, or are 0 beyond it.", at_least=1)
    max_mismatch: float = arg(
        0.1,
        "Stop where the log-probs of the server and of training differ by more nats, on average over the tokens.",
        above=0,
        infinite=True,
    )
    rollouts_ahead: int = arg(
        0,
        "1: a server samples the next round while this one trains, from weights that are one round older.",
        at_least=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward_weights(self)
        if self.sampler == "local" and self.mismatch not in (None, "none"):
            raise ValueError(f"mismatch: expected sampler vllm beside it, got {self.mismatch} with sampler local")
        if self.correction == "none" and self.mismatch_cap != CAP:
            raise ValueError(f"mismatch_cap: expected a mismatch to correct beside it, got {self.mismatch_cap:g} alone")
        if self.soft_punish_cache > self.max_response_length:
            raise ValueError(
                f"soft_punish_cache: expected at most max_response_length={self.max_response_length}, got "
                f"{self.soft_punish_cache}"
            )
        if self.rollouts_ahead and self.sampler == "local":
            raise ValueError("rollouts_ahead: expected 0 with sampler local, because one process cannot do both; got 1")
        if self.rollouts_ahead and self.correction == "none" and not self.takes_any_policy:
            raise ValueError(
                "mismatch: expected weights beside rollouts_ahead 1, because older weights draw the completions; got "
                "none"
            )
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")

    @property
    def takes_any_policy(self) -> bool:
        """Whether the method learns from completions of any policy, so that no weights correct for the sampler's."""
        return False

    @property
    def correction(self) -> Mismatch:
        """The weights that correct for the sampler's log-probs."""
        if self.mismatch is not None:
            return self.mismatch
        return "token_truncate" if self.sampler == "vllm" else "none"


@dataclass(frozen=True, kw_only=True)
class ReMaxConfig(OnlineConfig):
    """ReMax: REINFORCE with the greedy completion's score as baseline (arXiv 2310.10505)."""

    greedy_response_length: int | None = arg(
        None, "End greedy completions at this many tokens (ReMax-fast); default: max_response_length.", at_least=1
    )
    variant: RemaxVariant = arg("official", "Per-token weights: the authors' code, the paper, or verl's form.")
    gamma: float = arg(1.0, "Discount of the official variant (its scripts use 0.99).", at_least=0, at_most=1)
    score_clip: float = arg(
        5.0, "The score difference is clipped to +- this (official, paper); 0 turns clipping off.", at_least=0
    )


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(OnlineConfig):
    """REINFORCE without a baseline (Williams 1992), the yardstick of ReMax."""

    gamma: float = arg(1.0, "Discount of the score towards earlier tokens.", at_least=0, at_most=1)
    kl_to_go: bool = arg(
        False, "A token pays the KL penalty from itself to the end (REINFORCE++), not its own alone; needs gamma 1."
    )
    normalize_advantages: bool = arg(
        False, "Whiten the weights of all tokens of the batch, whose mean is then the baseline (REINFORCE++)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_to_go and self.gamma != 1:
            raise ValueError(f"gamma: expected 1 with kl_to_go, got {self.gamma}")


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(OnlineConfig):
    """RLOO: each sample's baseline is the mean of the others of its prompt (arXiv 2402.14740)."""

    group_size: int = arg(4, "Samples per prompt; batch_size counts samples.")
    normalize_advantages: bool = arg(
        False, "Whiten the advantages of the batch (with it RLOO is REINFORCE++-baseline, arXiv 2501.03262)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)


def check_groups(config: Any) -> None:
    """ValueError unless the groups of RLOO or GRPO make up a batch."""
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise ValueError(f"group_size: expected >= 2 and a divisor of batch_size, got {config.group_size}")


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineConfig):
    """Online DPO: the reward labels two samples of the policy, DPO learns from the pair (arXiv 2402.04792)."""

    batch_size: int = arg(32, "Sampled completions per round, two of each prompt.", at_least=1)
    beta: float = arg(0.1, BETA_HELP, above=0)
    loss_type: DPOLossType | list[DPOLossType] = arg("sigmoid", DPO_LOSS_HELP)
    loss_weights: list[float] | None = arg(None, LOSS_WEIGHTS_HELP)
    label_smoothing: float = arg(0.0, LABEL_SMOOTHING_HELP)
    simpo_gamma: float = arg(SIMPO_GAMMA, SIMPO_GAMMA_HELP, at_least=0)
    cpo_alpha: float = arg(CPO_ALPHA, CPO_ALPHA_HELP, at_least=0)
    kl_coef: float = arg(
        0.0,
        "A completion's score is less this times its KL to the reference, before the scores are compared.",
        at_least=0,
    )

    @property
    def takes_any_policy(self) -> bool:
        """As in `OnlineConfig`."""
        return True

    @property
    def correction(self) -> Mismatch:
        """None: DPO learns from pairs of any policy."""
        return "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair_losses(self)
        if self.mismatch not in (None, "none"):
            raise ValueError(
                f"mismatch: expected none, because DPO learns from pairs of any policy, got {self.mismatch}"
            )
        for name in ("batch_size", "micro_batch_size"):
            check(self, name, lambda v: v % 2 == 0, "an even number, since two completions make a pair")
