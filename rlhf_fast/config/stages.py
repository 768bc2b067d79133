"""One frozen dataclass per stage: it is the Python argument, the command-line flags and the YAML file at once.

Only values live here: no device or path is touched, no default depends on another module. Checks that need nothing but
the values run when the object is built, so a wrong config fails before any model is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from rlhf_fast.config.fields import arg, check, check_types, required

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


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage takes."""

    model: str = required("Checkpoint directory or hub name the trained model starts from.")
    output_dir: str = required("Directory for the trained model, metrics.jsonl, run.json and checkpoints.")
    seed: int = arg(0, "Seed of data order and sampling; same seed, same bits on CPU.")
    learning_rate: float = arg(1e-5, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")
    weight_decay: float = arg(0.0, "AdamW weight decay, on matrices only.")
    max_grad_norm: float = arg(1.0, "Gradient norm is clipped to this; 0 turns clipping off.")
    lr_schedule: LRSchedule = arg("linear", "Learning rate after warm-up: constant, or linear/cosine decay to 0.")
    warmup_steps: int = arg(0, "Optimizer steps of linear warm-up.")
    optimizer: Optimizer = arg("adamw", "AdamW, or with states of one byte (bitsandbytes).")
    optimizer_in_backward: bool = arg(
        False, "Step each weight in backward and free its gradient; needs max_grad_norm 0, one micro-batch per step."
    )
    lora_rank: int = arg(0, "Train LoRA adapters of this rank on all linear layers but the head; 0: all weights.")
    lora_alpha: float = arg(16.0, "The adapters' output is scaled by lora_alpha / lora_rank.")
    bf16: bool = arg(False, "Run forward and backward passes in bfloat16 autocast.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.")
    save_steps: int = arg(0, "Write a resumable checkpoint every so many steps; 0 writes only the final model.")
    resume: bool = arg(False, "Continue from the newest checkpoint in output_dir.")
    tensorboard: bool = arg(False, "Also write TensorBoard event files to output_dir/tensorboard.")

    def __post_init__(self) -> None:
        check_types(self)
        _check_seed(self)
        for name in ("learning_rate", "temperature", "value_learning_rate", "clip", "value_clip", "beta", "lora_alpha"):
            check(self, name, lambda v: v > 0, "a number > 0")
        for name in ("kl_target", "kl_horizon"):
            check(self, name, lambda v: v > 0, "a number > 0")
        for name in ("weight_decay", "max_grad_norm", "kl_coef", "center_coef", "score_clip", "value_coef"):
            check(self, name, lambda v: v >= 0, "a number >= 0")
        for name in ("warmup_steps", "save_steps", "eval_steps", "lora_rank", "top_k"):
            check(self, name, lambda v: v >= 0, "an integer >= 0")
        for name in (
            "batch_size",
            "micro_batch_size",
            "epochs",
            "steps",
            "minibatches",
            "max_length",
            "max_prompt_length",
            "max_response_length",
            "greedy_response_length",
        ):
            check(self, name, lambda v: v >= 1, "an integer >= 1")
        check(self, "top_p", lambda v: 0 < v <= 1, "a number in (0, 1]")
        for name in ("gamma", "lam"):
            check(self, name, lambda v: 0 <= v <= 1, "a number in [0, 1]")
        micro, batch = getattr(self, "micro_batch_size", None), getattr(self, "batch_size", None)
        if micro is not None and batch % micro:
            raise ValueError(f"micro_batch_size: expected a divisor of batch_size={batch}, got {micro}")
        minibatches = getattr(self, "minibatches", 1)
        if batch % minibatches:
            raise ValueError(f"minibatches: expected a divisor of batch_size={batch}, got {minibatches}")
        if self.optimizer_in_backward:
            if self.max_grad_norm:
                raise ValueError(f"max_grad_norm: expected 0 with optimizer_in_backward, got {self.max_grad_norm}")
            if micro is not None and micro < batch // minibatches:
                raise ValueError(
                    f"micro_batch_size: expected one micro-batch per step with optimizer_in_backward, "
                    f"{batch // minibatches} or more rows, got {micro}"
                )


def _check_seed(config: Any) -> None:
    check(config, "seed", lambda v: 0 <= v < 2**63, "an integer from 0 to 2^63 - 1")


def _check_groups(config: Any) -> None:
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise ValueError(f"group_size: expected >= 2 and a divisor of batch_size, got {config.group_size}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on prompt + completion rows or on messages."""

    train_data: str = required("JSONL(.gz), Parquet or `datasets` directory with prompt+completion, or messages.")
    eval_data: str | None = arg(None, "Same format; its loss is reported at the end of every epoch.")
    epochs: int = arg(1, "Passes over the data.")
    batch_size: int = arg(16, "Rows per optimizer step.")
    micro_batch_size: int | None = arg(None, "Rows per forward pass; default: the whole batch.")
    max_length: int = arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.")
    fused_head: bool = arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    learning_rate: float = arg(1e-5, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Reward model from preference pairs (Bradley-Terry) or K-wise rankings, initialised from the SFT model."""

    train_data: str = required("Rows with prompt+chosen+rejected(+margin), or prompt+completions+ranks.")
    eval_data: str | None = arg(None, "Held-out rows of the same format; pair accuracy is reported.")
    epochs: int = arg(1, "Passes over the data.")
    batch_size: int = arg(16, "Pairs (or rankings) per optimizer step.")
    micro_batch_size: int | None = arg(None, "Pairs (or rankings) per forward pass; default: the whole batch.")
    max_length: int = arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.")
    center_coef: float = arg(0.0, "Weight of mean((r_chosen + r_rejected)^2), which keeps scores near 0.")
    normalize_samples: int = arg(256, "Samples of the SFT model whose mean score is shifted to 0; 0 leaves it.")
    max_response_length: int = arg(64, "Longest of those samples in tokens.")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageConfig):
    """What every method takes that samples from its policy."""

    train_data: str = required("Rows with a prompt column; extra columns go to a Python reward function.")
    reward: str = required("Reward-model directory, or a function `package.module:name` or `file.py:name`.")
    reference: str | None = arg(None, "Reference model of the KL penalty; default: `model` as it is at the start.")
    eval_data: str | None = arg(
        None, "Held-out prompts, sampled and scored before and after; with a completion column also the win rate."
    )
    eval_reward: str | None = arg(None, "Reward for evaluation only (a ground truth, say); default: `reward`.")
    eval_steps: int = arg(0, "Evaluate every so many steps too; 0: before and after training only.")
    steps: int = arg(100, "Rollout + update rounds.")
    batch_size: int = arg(32, "Sampled completions per round.")
    micro_batch_size: int | None = arg(None, "Completions per forward pass; default: as many as the batch allows.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens; longer ones lose their left end.")
    max_response_length: int = arg(64, "Longest completion in tokens.")
    temperature: float = arg(1.0, "Sampling temperature; also applied in every training pass.")
    top_k: int = arg(0, "Draw from the k likeliest tokens, in evaluations too; 0: from all.")
    top_p: float = arg(1.0, "Draw from the likeliest tokens that hold this probability, in evaluations too; 1: all.")
    fused_head: bool = arg(
        True,
        "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits. So do top_k and top_p, "
        "whatever this says: their training passes see the very tokens that were drawn from, V / 8 bytes a place.",
    )
    kl_coef: float = arg(0.05, "Weight of the per-token KL penalty in the reward (k1 estimate).")
    kl_target: float | None = arg(None, "Adapt kl_coef towards this KL per completion in nats; default: fixed.")
    kl_horizon: float = arg(10_000, "Completions over which a KL 20 % or more off kl_target moves kl_coef by 20 %.")
    share_base: bool = arg(
        False, "Reward (and value) model as adapters on the policy's base: one frozen model for all; needs lora_rank."
    )
    offload: bool = arg(False, "Reference and reward model wait in CPU memory for their phase; no effect on a CPU.")
    missing_eos_penalty: float = arg(0.0, "Subtracted from the score of a completion that never ends.")
    max_logprob_drift: float | None = arg(
        None, "Fail when decode- and training-time log-probs differ by more; default: 0.01, or 0.5 in bf16."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """PPO with policy, value, reward and reference models (Schulman et al. 2017; Ziegler et al. 2019)."""

    learning_rate: float = arg(3e-6, "Peak learning rate of the policy.")
    critic: Critic = arg("model", "A value model of its own, or a value head on the policy's trunk.")
    value_coef: float = arg(0.1, "Weight of the value loss in the joint backward pass of a shared critic.")
    value_model: str | None = arg(None, "Value model to start from; default: the reward model, else `model`.")
    value_learning_rate: float = arg(1e-5, "Peak learning rate of the value model, or of a shared critic's head.")
    epochs: int = arg(4, "Passes over each rollout.")
    minibatches: int = arg(1, "Optimizer steps per pass.")
    clip: float = arg(0.2, "The probability ratio is clipped to [1 - clip, 1 + clip].")
    value_clip: float = arg(0.2, "New values are clipped to the old value +- this.")
    gamma: float = arg(1.0, "Discount.")
    lam: float = arg(0.95, "GAE lambda.")
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

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy.")
    greedy_response_length: int | None = arg(
        None, "End greedy completions at this many tokens (ReMax-fast); default: max_response_length."
    )
    variant: RemaxVariant = arg("official", "Per-token weights: the authors' code, the paper, or verl's form.")
    gamma: float = arg(1.0, "Discount of the official variant (its scripts use 0.99).")
    score_clip: float = arg(5.0, "The score difference is clipped to +- this (official, paper); 0 does not.")


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(OnlineConfig):
    """REINFORCE without a baseline (Williams 1992), the yardstick of ReMax."""

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy.")
    gamma: float = arg(1.0, "Discount of the score towards earlier tokens.")


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(OnlineConfig):
    """RLOO: each sample's baseline is the mean of the others of its prompt (arXiv 2402.14740)."""

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy.")
    group_size: int = arg(4, "Samples per prompt; batch_size counts samples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """GRPO: scores whitened within each prompt's group, PPO's clipped loss, KL in the loss (arXiv 2402.03300)."""

    learning_rate: float = arg(1e-6, "Peak learning rate of the policy.")
    group_size: int = arg(8, "Samples per prompt; batch_size counts samples.")
    kl_coef: float = arg(0.04, "Weight of the per-token KL to the reference in the loss (k3 estimate).")
    epochs: int = arg(1, "Passes over each rollout.")
    minibatches: int = arg(1, "Optimizer steps per pass.")
    clip: float = arg(0.2, "The probability ratio is clipped to [1 - clip, 1 + clip].")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(StageConfig):
    """What a method takes that learns from preference pairs alone."""

    learning_rate: float = arg(1e-6, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")
    train_data: str = required("Rows with prompt+chosen+rejected.")
    reference: str | None = arg(None, "Reference model; default: `model` as it is at the start.")
    epochs: int = arg(1, "Passes over the data.")
    batch_size: int = arg(16, "Pairs per optimizer step.")
    micro_batch_size: int | None = arg(None, "Pairs per forward pass; default: the whole batch.")
    fused_head: bool = arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    max_length: int = arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens.")
    eval_data: str | None = arg(
        None, "Held-out prompts, sampled and scored before and after; with a completion column also the win rate."
    )
    eval_reward: str | None = arg(None, "Reward that scores them: a directory or a Python function.")
    eval_steps: int = arg(0, "Evaluate every so many steps too; 0: before and after training only.")
    max_response_length: int = arg(64, "Longest completion sampled in evaluation, in tokens.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None and self.eval_reward is None:
            raise ValueError("eval_reward: expected a reward to score the samples of eval_data with, got none")


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling."""

    beta: float = arg(0.1, "Strength of the implicit KL constraint.")
    loss_type: DPOLossType = arg("sigmoid", "Loss on the log-ratio difference, named as in TRL.")
    label_smoothing: float = arg(0.0, "Probability that a label is flipped (cDPO, robust).")
    eval_pairs: str | None = arg(None, "Held-out pairs; their loss and accuracy are reported after every epoch.")

    def __post_init__(self) -> None:
        super().__post_init__()
        e = self.label_smoothing
        fits, expected = {
            "sigmoid": (0 <= e <= 1, "a number in [0, 1]"),
            "robust": (0 <= e < 0.5, "a number in [0, 0.5)"),
            "exo_pair": (0 < e < 1, "a number in (0, 1)"),
        }.get(self.loss_type, (e == 0, "0, as it has none,"))
        if not fits:
            raise ValueError(f"label_smoothing: expected {expected} for loss_type {self.loss_type}, got {e}")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """A tokenizer trained on text columns and a model with random weights, as one checkpoint directory."""

    model_config: str = required("JSON file with a transformers model config; needs model_type.")
    data: list[str] = required("JSONL(.gz), Parquet or `datasets` directories to train BPE on.")
    text_columns: list[str] = required("Columns of text, or of messages, to train it on.")
    output_dir: str = required("Checkpoint directory to write.")
    vocab_size: int = arg(4096, "Tokens, the special ones included.")
    seed: int = arg(0, "Seed of the weights.")
    max_rows: int | None = arg(None, "Use only the first so many rows of each file.")

    def __post_init__(self) -> None:
        check_types(self)
        _check_seed(self)
        for name in ("data", "text_columns"):
            check(self, name, bool, "at least one")
        check(self, "max_rows", lambda v: v >= 1, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Preference pairs: two samples of a model per prompt, labelled by Bradley-Terry on a reward."""

    model: str = required("Checkpoint directory or hub name to sample from.")
    prompts: str = required("Rows with a prompt column.")
    reward: str = required("Reward-model directory, or a function `package.module:name` or `file.py:name`.")
    output: str = required("JSONL file (.jsonl or .jsonl.gz) to write: prompt, chosen, rejected.")
    scale: float = arg(1.0, "P(a preferred) = sigmoid(scale * (reward(a) - reward(b))).")
    eval_output: str | None = arg(None, "Second file, for the pairs of the last eval_rows prompts.")
    eval_rows: int = arg(0, "Prompts whose pairs are held out into eval_output.")
    max_rows: int | None = arg(None, "Use only the first so many prompts.")
    batch_size: int = arg(64, "Prompts sampled at once.")
    max_prompt_length: int = arg(256, "Longest prompt in tokens; longer ones lose their left end.")
    max_response_length: int = arg(64, "Longest completion in tokens.")
    temperature: float = arg(1.0, "Sampling temperature.")
    seed: int = arg(0, "Seed of sampling and labelling.")

    def __post_init__(self) -> None:
        check_types(self)
        _check_seed(self)
        for name in ("max_rows", "batch_size", "max_prompt_length", "max_response_length"):
            check(self, name, lambda v: v >= 1, "an integer >= 1")
        check(self, "eval_rows", lambda v: v >= 0, "an integer >= 0")
        check(self, "temperature", lambda v: v > 0, "a number > 0")
        check(self, "scale", lambda v: v >= 0, "a number >= 0")
        for name in ("output", "eval_output"):
            check(self, name, lambda v: str(v).endswith((".jsonl", ".jsonl.gz")), "a .jsonl or .jsonl.gz file")
        if bool(self.eval_rows) != bool(self.eval_output):
            raise ValueError(f"eval_rows: expected both it and eval_output, or neither, got {self.eval_rows}")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """SFT -> reward model -> every named method from the same start on the same prompts, then a report.

    The sections hold the stages' own keys; `model`, `output_dir`, `reward` and `seed` are filled in where left out.
    """

    model: str = required("Checkpoint directory or hub name SFT starts from.")
    output_dir: str = required("Each stage writes to a folder of its own in here; report.html ties them together.")
    methods: list[str] = field(
        default_factory=lambda: ["ppo", "remax", "reinforce", "rloo", "dpo"],
        metadata={"help": "Methods to run after the reward model."},
    )
    seed: int = arg(0, "Seed of every stage that does not set its own.")
    title: str = arg("RLHF pipeline", "Title of the report.")
    resume: bool = arg(False, "Skip stages that finished; continue the one that was cut off.")
    common: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Keys for every method that has them; a method's own section wins."}
    )
    sft: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of SFTConfig."})
    pairs: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Keys of PairsConfig; where given, its pairs feed the reward model and DPO."},
    )
    reward: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of RewardConfig."})
    ppo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of PPOConfig."})
    remax: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of ReMaxConfig."})
    reinforce: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of ReinforceConfig."})
    rloo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of RLOOConfig."})
    grpo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of GRPOConfig."})
    dpo: dict[str, Any] = field(default_factory=dict, metadata={"help": "Keys of DPOConfig."})


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The whole pipeline on a small world the project makes itself: no download, minutes on a laptop CPU."""

    output_dir: str = arg("demo_out", "Where models, metrics and report.html go.")
    seed: int = arg(0, "Seed of data, models and sampling; same seed, same bits.")
    quick: bool = arg(False, "A tenth of the steps: shows that everything runs, proves nothing.")
    resume: bool = arg(False, "Skip what an earlier, interrupted demo in output_dir finished.")
