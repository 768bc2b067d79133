"""One frozen dataclass per training stage: the Python argument, the command-line flags and the YAML file at once.

Here are the bases and the stages that learn from rows; `online` has the methods that sample from their policy.

Only values live here: no device or path is touched, no default depends on another module. Checks that need nothing but
the values run when the object is built, so a wrong config fails before any model is loaded. A field that a subclass
gives another default or another help text keeps its place, and repeats its bounds.

    StageConfig            every training stage
      MethodConfig         methods: the policy starts from a reference and is evaluated on held-out prompts
        OnlineConfig       methods that sample from their policy, in `online`
          ClippedConfig    methods that make several clipped updates of each rollout, in `clipped`
        OfflineConfig      methods that learn from the rows of train_data alone
    OfflineData            beside one of these: a stage that passes over the rows of train_data
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_fast.config.fields import (
    arg,
    check,
    check_fields,
    check_row_options,
    random_seed,
    required,
    temperature,
)
from rlhf_fast.config.sampling import SamplerOptions, check_sampler

__all__ = [
    "DPOConfig",
    "KTOConfig",
    "MethodConfig",
    "OfflineConfig",
    "OfflineData",
    "RewardConfig",
    "SFTConfig",
    "StageConfig",
]

KINDS = {
    **dict.fromkeys(("train_data", "eval_data", "eval_pairs", "eval_rows", "prompts"), "rows"),
    **dict.fromkeys(("model", "reference", "value_model"), "model"),
    **dict.fromkeys(("reward", "eval_reward"), "reward"),
    "chat_template": "template",
}
"""The fields of configs that name something to be read, and what it is."""
LRSchedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit"]
Shard = Literal["none", "full", "hybrid"]
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
    "bco_pair",
    "sft",
    "cpo",
    "simpo",
    "orpo",
]
REFERENCE_FREE = ("sft", "cpo", "simpo", "orpo")
"""The DPO losses that have no reference."""
Dtype = Literal["fp32", "bf16"]
DTYPE_HELP = "Trained weights and their passes; bf16 keeps fp32 master weights in the optimizer (LoRA: fp32 adapters)."
KTOLossType = Literal["kto", "apo_zero_unpaired"]
FUSED_HEAD_HELP = "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits."

REWARD_TIMEOUT_HELP = "Seconds that a call of a reward function may take before the run ends; default: no limit."
TRUST_REMOTE_CODE_HELP = "Run the Python files that stand beside the weights of a family of its own."
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
SHARD_HELP = (
    "Spread weights, gradients and optimizer states over the processes of torchrun (FSDP2): full over all of them; "
    "hybrid over those of a machine."
)
_SHARD_BASE = (
    "With lora_rank and shard: the adapters' frozen base goes into shards too; false keeps it whole everywhere."
)
ALPHA = 16.0  # of LoRA
BETA_HELP = "Strength of the implicit KL constraint."
LABEL_SMOOTHING_HELP = "Probability that a label is flipped (cDPO, robust)."
DPO_LOSS_HELP = "Loss on the pairs, named as in TRL; repeated: a mixture. sft, cpo, simpo and orpo have no reference."
LOSS_WEIGHTS_HELP = "Weight of each of several losses; default: 1 for each."
SIMPO_GAMMA_HELP = "Margin of simpo."
CPO_ALPHA_HELP = "Weight of the likelihood of the chosen answers in cpo."
SIMPO_GAMMA, CPO_ALPHA = 0.5, 1.0


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


def check_shard(config: Any) -> None:
    """ValueError where an option does not go with models in shards."""
    if not getattr(config, "shard_base", True) and (config.shard == "none" or not config.lora_rank):
        got = f"shard={config.shard} and lora_rank={config.lora_rank}"
        raise ValueError(f"shard_base: expected False beside shard and lora_rank alone, got it with {got}")
    if config.shard != "none" and config.optimizer == "adamw_8bit" and not config.lora_rank:
        raise ValueError(
            f"optimizer: expected adamw with shard={config.shard}, got adamw_8bit, whose blocks of states "
            "cannot be cut into shards; adamw_8bit goes with lora_rank, whose adapters are not in shards"
        )


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage takes."""

    model: str = required("Checkpoint directory or hub name the trained model starts from.")
    output_dir: str = required("Directory for the trained model, metrics.jsonl, run.json and checkpoints.")
    train_data: str = required("Rows to train on: a file, a folder or glob of shards, or hub:NAME:SPLIT.")
    columns: dict[str, str] = arg({}, COLUMNS_HELP)
    chat_template: str | None = arg(None, CHAT_TEMPLATE_HELP)
    chat_template_kwargs: dict[str, Any] = arg({}, CHAT_TEMPLATE_KWARGS_HELP)
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
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
    lora_alpha: float = arg(ALPHA, "The adapters' output is scaled by lora_alpha / lora_rank.", above=0)
    dtype: Dtype = arg("fp32", DTYPE_HELP)
    bf16: bool = arg(False, "Run forward and backward passes in bfloat16 autocast, over fp32 weights.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.")
    shard: Shard = arg("none", SHARD_HELP)
    shard_base: bool = arg(True, _SHARD_BASE)
    save_steps: int = arg(
        0, "Write a resumable checkpoint every so many steps; 0 writes only the final model.", at_least=0
    )
    save_total_limit: int = arg(
        2, "Checkpoints kept; where the newest is damaged, a resumed run goes on from the one before.", at_least=1
    )
    resume: bool = arg(False, "Continue from the newest checkpoint in output_dir.")
    accept_changed: list[str] = arg(
        [],
        "What a resumed run may read in another version: reward, where its file was mended, train_data ...",
    )
    push_to_hub: str | None = arg(
        None, "Name on the Hugging Face hub, org/name, that gets the finished model with a model card."
    )
    track: list[str] = arg(
        [], "Trackers to send the run to: wandb, trackio, tensorboard, mlflow, or a `Listener` package.module:Class."
    )

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step."""
        return self.batch_size

    @property
    def shard_trained(self) -> Shard:
        """How the trained models are put into shards, and what stands on their base."""
        return self.shard if self.shard_base else "none"

    @property
    def frozen_weights(self) -> Literal["fp32", "bf16", "mixed"]:
        """How models that are not trained hold their weights, as `lm.loading` takes it."""
        return frozen_weights(self)

    def __post_init__(self) -> None:
        check_fields(self)
        check_row_options(self)
        check_precision(self)
        check_shard(self)
        check(self, "accept_changed", lambda v: set(v) <= KINDS.keys(), f"some of {', '.join(KINDS)}")
        if self.lora_alpha != ALPHA and not self.lora_rank:
            raise ValueError(
                f"lora_alpha: expected lora_rank above 0 beside it, got {self.lora_alpha:g} with lora_rank=0"
            )
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
    fused_head: bool = arg(True, FUSED_HEAD_HELP)


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
class MethodConfig(SamplerOptions, StageConfig):
    """What every method takes: its policy starts from a reference and is evaluated on held-out prompts."""

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy (AdamW; betas 0.9, 0.95; eps 1e-8).", above=0)
    reference: str | None = arg(None, "Reference model; default: `model` as it is at the start.")
    frozen_dtype: Dtype | None = arg(None, _FROZEN_DTYPE)
    fused_head: bool = arg(True, FUSED_HEAD_HELP)
    eval_data: str | None = arg(
        None, "Held-out prompts, sampled and scored before and after; with a completion column also the win rate."
    )
    eval_reward: str | None = arg(None, "Reward that scores these samples: a directory or a Python function.")
    eval_steps: int = arg(0, "Evaluate every so many steps too; 0: before and after training only.", at_least=0)
    max_response_length: int = arg(64, "Longest sampled completion in tokens.", at_least=1)
    reward_timeout: float | None = arg(None, REWARD_TIMEOUT_HELP, above=0)
    temperature: float = temperature("Sampling temperature, in evaluations too; training on samples applies it too.")
    top_k: int = arg(0, "Draw from the k likeliest tokens, in evaluations too; 0: from all tokens.", at_least=0)
    top_p: float = arg(
        1.0,
        "Draw from the likeliest tokens that hold this probability, in evaluations too; 1: from all tokens.",
        above=0,
        at_most=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_sampler(self)


def loss_names(config: Any) -> list[str]:
    """The names of the losses of DPO or online DPO."""
    return [config.loss_type] if isinstance(config.loss_type, str) else [*config.loss_type]


def check_pair_losses(config: Any) -> None:
    """ValueError where the options of the loss of DPO or online DPO do not fit its `loss_type`."""
    names, e, weights = loss_names(config), config.label_smoothing, config.loss_weights
    if weights is not None and (len(weights) != len(names) or not all(math.isfinite(w) for w in weights)):
        raise ValueError(f"loss_weights: expected a finite number for each of {len(names)} losses, got {weights}")
    bounds = {
        "robust": (0 <= e < 0.5, "a number in [0, 0.5)"),
        "exo_pair": (0 < e < 1, "a number in (0, 1)"),
        **dict.fromkeys(("sigmoid", "cpo", "simpo"), (0 <= e <= 1, "a number in [0, 1]")),
    }
    shown = " ".join(names)
    wanted = [bounds[name] for name in names if name in bounds] or [(e == 0, "0, as it has none,")]
    for fits, expected in wanted:
        if not fits:
            raise ValueError(f"label_smoothing: expected {expected} for loss_type {shown}, got {e}")
    for name, loss, default in (("simpo_gamma", "simpo", SIMPO_GAMMA), ("cpo_alpha", "cpo", CPO_ALPHA)):
        if loss not in names and getattr(config, name) != default:
            raise ValueError(f"{name}: expected loss_type {loss} beside it, got loss_type {shown}")


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
    beta: float = arg(0.1, BETA_HELP, above=0)
    loss_type: DPOLossType | list[DPOLossType] = arg("sigmoid", DPO_LOSS_HELP)
    loss_weights: list[float] | None = arg(None, LOSS_WEIGHTS_HELP)
    label_smoothing: float = arg(0.0, LABEL_SMOOTHING_HELP)
    simpo_gamma: float = arg(SIMPO_GAMMA, SIMPO_GAMMA_HELP, at_least=0)
    cpo_alpha: float = arg(CPO_ALPHA, CPO_ALPHA_HELP, at_least=0)
    eval_pairs: str | None = arg(None, "Held-out pairs; their loss and accuracy are reported after every epoch.")
    reference_logprobs: str | None = arg(None, _REFERENCE_LOGPROBS)

    @property
    def reference_free(self) -> bool:
        """Whether no loss has a reference. A reference is loaded then for evaluations alone, which report its KL."""
        return all(name in REFERENCE_FREE for name in loss_names(self))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair_losses(self)
        shown = " ".join(loss_names(self))
        if self.reference_free and self.reference_logprobs is not None:
            raise ValueError(
                f"reference_logprobs: expected none, because loss_type {shown} has no reference, got "
                f"{self.reference_logprobs!r}"
            )
        if self.reference_free and self.reference is not None and self.eval_data is None:
            raise ValueError(
                f"reference: expected none, because loss_type {shown} has no reference and nothing is evaluated, got "
                f"{self.reference!r}"
            )


@dataclass(frozen=True, kw_only=True)
class KTOConfig(OfflineConfig):
    """KTO: preference optimisation from single completions, labelled good or bad (arXiv 2402.01306)."""

    train_data: str = required("Rows with prompt+completion+label, or pairs: prompt+chosen+rejected.")
    batch_size: int = arg(16, "Rows per optimizer step.", at_least=1)
    beta: float = arg(0.1, BETA_HELP, above=0)
    loss_type: KTOLossType = arg("kto", "Loss, named as in TRL; apo_zero_unpaired has no KL estimate.")
    desirable_weight: float = arg(1.0, "Weight of good rows.", at_least=0)
    undesirable_weight: float = arg(1.0, "Weight of bad rows; even out unequal numbers by it.", at_least=0)
    eval_rows: str | None = arg(None, "Held-out rows; their loss is reported after every epoch.")
    reference_logprobs: str | None = arg(None, _REFERENCE_LOGPROBS)
