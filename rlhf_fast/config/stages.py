"""One frozen dataclass per training stage: it is the Python argument, the command-line flags and the YAML file at once.

Only values live here: no device or path is touched, no default depends on another module. Checks that need nothing but
the values run when the object is built, so a wrong config fails before any model is loaded. A field that a subclass
gives another default or another help text keeps its place, and repeats its bounds.

    StageConfig            every training stage
      MethodConfig         methods: the policy starts from a reference and is evaluated on held-out prompts
        OnlineConfig       methods that sample from their policy
          ClippedConfig    methods that make several clipped updates of each rollout
        OfflineConfig      methods that learn from the rows of train_data alone
    OfflineData            beside one of these: a stage that passes over the rows of train_data
"""

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_fast.config.fields import (
    arg,
    check,
    check_fields,
    check_reward_weights,
    check_row_options,
    random_seed,
    required,
)

__all__ = [
    "ClippedConfig",
    "DPOConfig",
    "GRPOConfig",
    "KTOConfig",
    "MethodConfig",
    "OfflineConfig",
    "OfflineData",
    "OnlineConfig",
    "OnlineDPOConfig",
    "PPOConfig",
    "RLOOConfig",
    "ReMaxConfig",
    "ReinforceConfig",
    "RewardConfig",
    "SFTConfig",
    "StageConfig",
]

LRSchedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit"]
Critic = Literal["model", "shared"]
RemaxVariant = Literal["official", "paper", "verl"]
DPOLossType = Literal[
    "sigmoid",
    "robust",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "apo_zero",
    "apo_down",
    "sigmoid_norm",
    "sppo_hard",
    "discopop",
]
Dtype = Literal["fp32", "bf16"]
DTYPE_HELP = "Trained weights and their passes; bf16 keeps fp32 master weights in the optimizer (LoRA: fp32 adapters)."
KTOLossType = Literal["kto", "apo_zero_unpaired"]
_FUSED_HEAD = "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits."

COLUMNS_HELP = "Columns that the data name otherwise, ours first: prompt=question completion=answer."
CHAT_TEMPLATE_HELP = "Jinja file (or the text) of the chat template; default: the tokenizer's own."
CHAT_TEMPLATE_KWARGS_HELP = "Options of the chat template: enable_thinking=false; a row's own column of this name wins."
_FROZEN_DTYPE = (
    "Weights of models that are not trained; default: bf16 where the trained model's passes are (dtype bf16, or bf16), "
    "else fp32."
)
_REFERENCE_LOGPROBS = (
    "Safetensors file of the reference's log-probs: read where weights, rows and precision match, else (re)written."
)
_BETA = "Strength of the implicit KL constraint."
_LABEL_SMOOTHING = "Probability that a label is flipped (cDPO, robust)."


def frozen_weights(config: Any) -> Literal["fp32", "bf16", "mixed"]:
    """The weights of models that are not trained, from a config's dtype, bf16 and frozen_dtype.

    "mixed", bf16 weights in passes under autocast, stands beside trained fp32 weights, and "bf16" beside trained bf16
    weights. Passes of a frozen model are thus of the same kind as those of the trained model.
    """
    default = "bf16" if config.bf16 or config.dtype == "bf16" else "fp32"
    dtype = getattr(config, "frozen_dtype", None) or default
    return "mixed" if dtype == "bf16" and config.dtype == "fp32" else dtype


def check_precision(config: Any) -> None:
    """ValueError where dtype and bf16 contradict each other, and where a shared base would need two dtypes."""
    if config.bf16 and config.dtype == "bf16":
        raise ValueError("bf16: expected autocast over fp32 weights, got it with dtype=bf16, which needs none")
    frozen = getattr(config, "frozen_dtype", None)
    if getattr(config, "share_base", False) and frozen not in (None, config.dtype):
        raise ValueError(f"frozen_dtype: expected {config.dtype}, the dtype of the shared base, got {frozen}")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage takes."""

    model: str = required("Checkpoint directory or hub name the trained model starts from.")
    output_dir: str = required("Directory for the trained model, metrics.jsonl, run.json and checkpoints.")
    train_data: str = required("Rows to train on: a file, a folder or glob of shards, or hub:NAME:SPLIT.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    seed: int = random_seed("Seed of data order and sampling; same seed, same bits on CPU.")
    batch_size: int = arg(16, "Rows per optimizer step; a pair or a ranking is one row.", at_least=1)
    micro_batch_size: int | None = arg(None, "Rows per forward pass; default: the whole batch.", at_least=1)
    max_prompt_length: int = arg(256, "Longest prompt in tokens; longer ones lose their left end.", at_least=1)
    learning_rate: float = arg(1e-5, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).", above=0)
    weight_decay: float = arg(0.0, "AdamW weight decay, on matrices only.", at_least=0)
    max_grad_norm: float = arg(1.0, "Gradient norm is clipped to this; 0 turns clipping off.", at_least=0)
    lr_schedule: LRSchedule = arg("linear", "Learning rate after warm-up: constant, or linear/cosine decay to 0.")
    warmup_steps: int = arg(0, "Optimizer steps of linear warm-up.", at_least=0)
    optimizer: Optimizer = arg("adamw", "AdamW, or AdamW with states of one byte (bitsandbytes).")
    optimizer_in_backward: bool = arg(
        False, "Step each weight in backward and free its gradient; needs max_grad_norm 0, one micro-batch per step."
    )
    lora_rank: int = arg(
        0, "Train LoRA adapters of this rank on all linear layers but the head; 0: all weights.", at_least=0
    )
    lora_alpha: float = arg(16.0, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0)
    dtype: Dtype = arg("fp32", DTYPE_HELP)
    bf16: bool = arg(False, "Run forward and backward passes in bfloat16 autocast, over fp32 weights.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.")
    save_steps: int = arg(
        0, "Write a resumable checkpoint every so many steps; 0 writes only the final model.", at_least=0
    )
    resume: bool = arg(False, "Continue from the newest checkpoint in output_dir.")
    tensorboard: bool = arg(False, "Also write TensorBoard event files to output_dir/tensorboard.")

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size

    @property
    def frozen_weights(self) -> Literal["fp32", "bf16", "mixed"]:
        """How models that are not trained hold their weights, as `lm.loading` takes it."""
        return frozen_weights(self)

    def __post_init__(self) -> None:
        check_fields(self)
        check_row_options(self)
        check_precision(self)
        micro, batch = self.micro_batch_size, self.batch_size
        if micro is not None and batch % micro:
            raise ValueError(f"micro_batch_size: expected a divisor of batch_size={batch}, got {micro}")
        if self.optimizer_in_backward:
            if self.max_grad_norm:
                raise ValueError(f"max_grad_norm: expected 0 with optimizer_in_backward, got {self.max_grad_norm}")
            if micro is not None and micro < self.rows_per_step:
                raise ValueError(
                    f"micro_batch_size: expected one micro-batch per step with optimizer_in_backward, "
                    f"{self.rows_per_step} or more rows, got {micro}"
                )


@dataclass(frozen=True, kw_only=True)
class OfflineData:
    """What a stage takes that passes over the rows of train_data."""

    # Not a StageConfig: if two bases of a dataclass share a base, the fields of the first hide the second's overrides.

    epochs: int = arg(1, "Passes over the data.", at_least=1)
    max_length: int = arg(512, "Longest prompt + completion in tokens; longer completions lose their end.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineData, StageConfig):
    """Supervised fine-tuning on prompt + completion rows or on messages."""

    train_data: str = required(
        "JSONL, JSON, CSV, Parquet, shards or hub:NAME:SPLIT with prompt+completion, or messages."
    )
    eval_data: str | None = arg(None, "Same format; its loss is reported at the end of every epoch.")
    fused_head: bool = arg(True, _FUSED_HEAD)


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineData, StageConfig):
    """Reward model from preference pairs (Bradley-Terry) or K-wise rankings, initialised from the SFT model."""

    train_data: str = required("Rows with prompt+chosen+rejected(+margin), or prompt+completions+ranks.")
    eval_data: str | None = arg(None, "Held-out rows of the same format; pair accuracy is reported.")
    frozen_dtype: Dtype | None = arg(None, _FROZEN_DTYPE)
    center_coef: float = arg(0.0, "Weight of mean((r_chosen + r_rejected)^2), which keeps scores near 0.", at_least=0)
    normalize_samples: int = arg(
        256, "Samples of the SFT model whose mean score is shifted to 0; 0: no shift.", at_least=0
    )
    max_response_length: int = arg(64, "Longest of these samples, in tokens.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class MethodConfig(StageConfig):
    """What every method takes: its policy starts from a reference and is evaluated on held-out prompts."""

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy (AdamW; betas 0.9, 0.95; eps 1e-8).", above=0)
    reference: str | None = arg(None, "Reference model; default: `model` as it is at the start.")
    frozen_dtype: Dtype | None = arg(None, _FROZEN_DTYPE)
    fused_head: bool = arg(True, _FUSED_HEAD)
    eval_data: str | None = arg(
        None, "Held-out prompts, sampled and scored before and after; with a completion column also the win rate."
    )
    eval_reward: str | None = arg(None, "Reward that scores these samples: a directory or a Python function.")
    eval_steps: int = arg(0, "Evaluate every so many steps too; 0: before and after training only.", at_least=0)
    max_response_length: int = arg(64, "Longest sampled completion in tokens.", at_least=1)


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
    temperature: float = arg(1.0, "Sampling temperature; also applied in every training pass.", above=0)
    top_k: int = arg(0, "Draw from the k likeliest tokens, in evaluations too; 0: from all tokens.", at_least=0)
    top_p: float = arg(
        1.0,
        "Draw from the likeliest tokens that hold this probability, in evaluations too; 1: from all tokens.",
        above=0,
        at_most=1,
    )
    fused_head: bool = arg(
        True,
        f"{_FUSED_HEAD} With top_k or top_p losses always come from logits, "
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
    max_logprob_drift: float | None = arg(
        None,
        "Stop where a token's log-probs of decoding and of training differ by more; default: 0.01; in bf16 the mean "
        "difference of the tokens may be 0.1.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_reward_weights(self)
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")


@dataclass(frozen=True, kw_only=True)
class ClippedConfig(OnlineConfig):
    """What a method takes that makes several clipped updates of each rollout."""

    epochs: int = arg(1, "Passes over each rollout.", at_least=1)
    minibatches: int = arg(1, "Optimizer steps per pass.", at_least=1)
    clip: float = arg(0.2, "The probability ratio is clipped to [1 - clip, 1 + clip].", above=0)

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step, a part of each rollout."""
        return self.batch_size // self.minibatches

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.minibatches:
            raise ValueError(f"minibatches: expected a divisor of batch_size={self.batch_size}, got {self.minibatches}")


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
    value_clip: float = arg(0.2, "New values are clipped to the old value +- this.", above=0)
    gamma: float = arg(1.0, "Discount.", at_least=0, at_most=1)
    lam: float = arg(0.95, "GAE lambda.", at_least=0, at_most=1)
    whiten_rewards: bool = arg(False, "Divide the shaped rewards by their standard deviation.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.critic == "shared" and self.value_model is not None:
            raise ValueError(f"value_model: expected none with the shared critic, got {self.value_model!r}")
        if self.critic == "shared" and not self.fused_head:
            raise ValueError("fused_head: expected true with the shared critic, which needs the hidden states")
        if self.critic == "shared" and (self.top_k or self.top_p < 1):
            raise ValueError("critic: expected a model of its own beside top_k or top_p, which go through the logits")


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


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(OnlineConfig):
    """RLOO: each sample's baseline is the mean of the others of its prompt (arXiv 2402.14740)."""

    group_size: int = arg(4, "Samples per prompt; batch_size counts samples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(ClippedConfig):
    """GRPO: scores whitened within each prompt's group, PPO's clipped loss, KL in the loss (arXiv 2402.03300)."""

    group_size: int = arg(8, "Samples per prompt; batch_size counts samples.")
    kl_coef: float = arg(0.04, "Weight of the per-token KL to the reference in the loss (k3 estimate).", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


def _check_groups(config: RLOOConfig | GRPOConfig) -> None:
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise ValueError(f"group_size: expected >= 2 and a divisor of batch_size, got {config.group_size}")


def _check_label_smoothing(config: "DPOConfig | OnlineDPOConfig") -> None:
    e = config.label_smoothing
    fits, expected = {
        "sigmoid": (0 <= e <= 1, "a number in [0, 1]"),
        "robust": (0 <= e < 0.5, "a number in [0, 0.5)"),
        "exo_pair": (0 < e < 1, "a number in (0, 1)"),
    }.get(config.loss_type, (e == 0, "0, as it has none,"))
    if not fits:
        raise ValueError(f"label_smoothing: expected {expected} for loss_type {config.loss_type}, got {e}")


@dataclass(frozen=True, kw_only=True)
class OnlineDPOConfig(OnlineConfig):
    """Online DPO: the reward labels two samples of the policy, DPO learns from the pair (arXiv 2402.04792)."""

    batch_size: int = arg(32, "Sampled completions per round, two of each prompt.", at_least=1)
    beta: float = arg(0.1, _BETA, above=0)
    loss_type: DPOLossType = arg("sigmoid", "Loss on the log-ratio difference, named as in TRL.")
    label_smoothing: float = arg(0.0, _LABEL_SMOOTHING)
    kl_coef: float = arg(
        0.0,
        "A completion's score is less this times its KL to the reference, before the scores are compared.",
        at_least=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self)
        for name in ("batch_size", "micro_batch_size"):
            check(self, name, lambda v: v % 2 == 0, "an even number, since two completions make a pair")


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(OfflineData, MethodConfig):
    """What a method takes that learns from the rows of train_data alone."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None and self.eval_reward is None:
            raise ValueError("eval_reward: expected a reward to score the samples of eval_data with, got none")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling."""

    train_data: str = required("Rows with prompt+chosen+rejected.")
    beta: float = arg(0.1, _BETA, above=0)
    loss_type: DPOLossType = arg("sigmoid", "Loss on the log-ratio difference, named as in TRL.")
    label_smoothing: float = arg(0.0, _LABEL_SMOOTHING)
    eval_pairs: str | None = arg(None, "Held-out pairs; their loss and accuracy are reported after every epoch.")
    reference_logprobs: str | None = arg(None, _REFERENCE_LOGPROBS)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self)


@dataclass(frozen=True, kw_only=True)
class KTOConfig(OfflineConfig):
    """KTO: preference optimisation from single completions, labelled good or bad (arXiv 2402.01306)."""

    train_data: str = required("Rows with prompt+completion+label, or pairs: prompt+chosen+rejected.")
    batch_size: int = arg(16, "Rows per optimizer step.", at_least=1)
    beta: float = arg(0.1, _BETA, above=0)
    loss_type: KTOLossType = arg("kto", "Loss, named as in TRL; apo_zero_unpaired has no KL estimate.")
    desirable_weight: float = arg(1.0, "Weight of good rows.", at_least=0)
    undesirable_weight: float = arg(1.0, "Weight of bad rows; even out unequal numbers by it.", at_least=0)
    eval_rows: str | None = arg(None, "Held-out rows; their loss is reported after every epoch.")
    reference_logprobs: str | None = arg(None, _REFERENCE_LOGPROBS)
