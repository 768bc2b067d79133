"""The configs of PPO and GRPO, which make several updates of each rollout; `stages` says how configs are built."""

from dataclasses import dataclass
from typing import Literal

from rlhf_fast.config.fields import arg
from rlhf_fast.config.online import OnlineConfig, check_groups

__all__ = ["ClippedConfig", "GRPOConfig", "PPOConfig"]

Critic = Literal["model", "shared"]
PolicyLossType = Literal["grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo"]
Level = Literal["token", "sequence", "sequence_token"]
Where = Literal["reward", "loss"]
Estimator = Literal["k1", "k2", "k3", "abs"]
ScaleRewards = Literal["group", "batch", "none"]
CLIP, LARGEST_RATIO, SAPO = 0.2, 5.0, (1.0, 1.05)


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(OnlineConfig):
    """What a method takes that makes several clipped updates of each rollout."""

    epochs: int = arg(1, "Passes over each rollout.", at_least=1)
    minibatches: int = arg(1, "Optimizer steps per pass.", at_least=1)
    loss_type: PolicyLossType = arg("bnpo", "Loss and its denominator, named as in TRL.")
    importance_sampling_level: Level = arg(
        "token", "A ratio for each token, or for each completion (GSPO; sequence_token takes advantages per token)."
    )
    clip: float = arg(CLIP, "The probability ratio is clipped to [1 - clip, 1 + clip].", above=0, below=1)
    clip_high: float | None = arg(
        None, "Upper bound 1 + clip_high in place of 1 + clip (DAPO: 0.28); of cispo the largest ratio, 5.", above=0
    )
    delta: float | None = arg(None, "Largest ratio where the advantage is negative (dual clip).", above=1)
    sapo_temperature_pos: float = arg(SAPO[0], "Of sapo, where the advantage is positive.", above=0, at_most=80)
    sapo_temperature_neg: float = arg(SAPO[1], "Of sapo, where the advantage is not positive.", above=0, at_most=80)
    kl_in: Where = arg("reward", "Take the KL penalty off the reward, or add it to the loss.")
    kl_estimator: Estimator | None = arg(None, "Estimate of the KL; default: k1 in the reward, k3 in the loss.")
    use_bias_correction_kl: bool = arg(
        False, "Multiply the KL in the loss by the ratio; its gradient is then that of the reverse KL."
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, a part of each rollout."""
        return self.batch_size // self.minibatches

    @property
    def estimator(self) -> Estimator:
        """The estimate of the KL."""
        return self.kl_estimator or ("k1" if self.kl_in == "reward" else "k3")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.minibatches:
            raise ValueError(f"minibatches: expected a divisor of batch_size={self.batch_size}, got {self.minibatches}")
        self._check_bounds()
        self._check_kl()
        if self.loss_type == "luspo" and self.importance_sampling_level == "token":
            raise ValueError(
                "importance_sampling_level: expected sequence or sequence_token with loss_type luspo, got token"
            )

    def _check_bounds(self) -> None:
        """ValueError where a bound does not belong to the loss."""
        clipped, kind = self.loss_type not in ("cispo", "sapo"), self.loss_type
        if not clipped and self.clip != CLIP:
            raise ValueError(
                f"clip: expected its default with loss_type {kind}, which does not use it, got {self.clip}"
            )
        if not clipped and self.delta is not None:
            raise ValueError(f"delta: expected none with loss_type {kind}, which does not use it, got {self.delta}")
        if kind == "sapo" and self.clip_high is not None:
            raise ValueError(f"clip_high: expected none with loss_type sapo, got {self.clip_high}")
        for name, default in zip(("sapo_temperature_pos", "sapo_temperature_neg"), SAPO, strict=True):
            if kind != "sapo" and getattr(self, name) != default:
                raise ValueError(f"{name}: expected loss_type sapo beside it, got loss_type {kind}")

    def _check_kl(self) -> None:
        """ValueError where the KL's options do not fit each other."""
        if self.use_bias_correction_kl and self.kl_in == "reward":
            raise ValueError("use_bias_correction_kl: expected kl_in loss beside it, got kl_in reward")
        if self.use_bias_correction_kl and self.importance_sampling_level != "token":
            raise ValueError(
                "use_bias_correction_kl: expected importance_sampling_level token beside it, got "
                f"{self.importance_sampling_level}"
            )
        if self.kl_in == "loss" and self.estimator == "k1" and not self.use_bias_correction_kl:
            raise ValueError(
                "kl_estimator: expected k2, k3 or abs with kl_in loss, or use_bias_correction_kl beside it, because "
                "the gradient of k1 is 0 on average; got k1"
            )


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ClippedConfig):
    """PPO with policy, value, reward and reference models (Schulman et al. 2017; Ziegler et al. 2019)."""

    learning_rate: float = arg(3e-6, "Peak learning rate of the policy.", above=0)
    epochs: int = arg(4, "Passes over each rollout.", at_least=1)
    critic: Critic = arg("model", "A value model of its own, or a value head on the policy's trunk.")
    value_coef: float = arg(0.1, "Weight of the value loss in the joint backward pass of a shared critic.", at_least=0)
    value_model: str | None = arg(None, "Value model to start from; default: the reward model, else `model`.")
    value_learning_rate: float = arg(
        1e-5, "Peak learning rate of the value model, or of a shared critic's head.", above=0
    )
    value_clip: float = arg(0.2, "New values are clipped to the old value +- this.", above=0, infinite=True)
    gamma: float = arg(1.0, "Discount.", at_least=0, at_most=1)
    lam: float = arg(0.95, "GAE lambda.", at_least=0, at_most=1)
    value_lam: float | None = arg(
        None, "GAE lambda of the value model's targets (VAPO: 1); default: lam.", at_least=0, at_most=1
    )
    length_adaptive_alpha: float = arg(
        0.0, "The advantages' lambda of n tokens is 1 - 1 / (this * n) (VAPO: 0.05); 0: lam.", at_least=0
    )
    whiten_rewards: bool = arg(False, "Divide the shaped rewards by their standard deviation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance_sampling_level == "sequence":
            raise ValueError(
                "importance_sampling_level: expected token or sequence_token, because the advantages of PPO are those "
                "of tokens, got sequence"
            )
        if self.critic == "shared" and self.value_model is not None:
            raise ValueError(f"value_model: expected none with the shared critic, got {self.value_model!r}")
        if self.critic == "shared" and not self.fused_head:
            raise ValueError("fused_head: expected true with the shared critic, which needs the hidden states")
        if self.critic == "shared" and (self.top_k or self.top_p < 1):
            raise ValueError("critic: expected a model of its own beside top_k or top_p, which go through the logits")


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(ClippedConfig):
    """GRPO: scores whitened within each prompt's group, PPO's clipped loss, KL in the loss (arXiv 2402.03300)."""

    group_size: int = arg(8, "Samples per prompt; batch_size counts samples.")
    loss_type: PolicyLossType = arg("grpo", "Loss and its denominator, named as in TRL.")
    scale_rewards: ScaleRewards = arg(
        "group", "Divide the advantages by the deviation of the group, of the batch, or not at all (Dr. GRPO)."
    )
    mask_truncated_completions: bool = arg(False, "Leave completions that never end out of the loss (DAPO).")
    max_num_gen_batches: int = arg(
        1,
        "Sample up to so many batches in a round, to replace prompts whose scores are all equal (DAPO's dynamic "
        "sampling); 1: no more than the round's own.",
        at_least=1,
    )
    kl_in: Where = arg("loss", "Take the KL penalty off the reward, or add it to the loss.")
    kl_coef: float = arg(0.04, "Weight of the KL to the reference.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self)
        if self.rollouts_ahead and self.max_num_gen_batches > 1:
            raise ValueError(
                "max_num_gen_batches: expected 1 with rollouts_ahead 1, because the server samples the next round, got "
                f"{self.max_num_gen_batches}"
            )
