"""One frozen dataclass per stage: it is the Python argument, the command-line flags and the YAML file at once.

Only values live here: no device or path is touched, no default depends on another module. Checks that need nothing but
the values run when the object is built, so a wrong config fails before any model is loaded.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

LRSchedule = Literal["constant", "linear", "cosine"]
Optimizer = Literal["adamw", "adamw_8bit"]
Critic = Literal["model", "shared"]
Method = Literal["sft", "reward", "dpo", "ppo", "remax", "reinforce", "rloo", "grpo"]
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


def _arg(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _required(help: str) -> Any:
    return field(metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """What every training stage takes."""

    model: str = _required("Checkpoint directory or hub name the trained model starts from.")
    output_dir: str = _required("Directory for the trained model, metrics.jsonl, run.json and checkpoints.")
    seed: int = _arg(0, "Seed of data order and sampling; same seed, same bits on CPU.")
    learning_rate: float = _arg(1e-5, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")
    weight_decay: float = _arg(0.0, "AdamW weight decay, on matrices only.")
    max_grad_norm: float = _arg(1.0, "Gradient norm is clipped to this; 0 turns clipping off.")
    lr_schedule: LRSchedule = _arg("linear", "Learning rate after warm-up: constant, or linear/cosine decay to 0.")
    warmup_steps: int = _arg(0, "Optimizer steps of linear warm-up.")
    optimizer: Optimizer = _arg("adamw", "AdamW, or with states of one byte (bitsandbytes).")
    optimizer_in_backward: bool = _arg(
        False, "Step each weight in backward and free its gradient; needs max_grad_norm 0, one micro-batch per step."
    )
    lora_rank: int = _arg(0, "Train LoRA adapters of this rank on all linear layers but the head; 0: all weights.")
    lora_alpha: float = _arg(16.0, "The adapters' output is scaled by lora_alpha / lora_rank.")
    bf16: bool = _arg(False, "Run forward and backward passes in bfloat16 autocast.")
    gradient_checkpointing: bool = _arg(False, "Recompute activations in backward to save memory.")
    save_steps: int = _arg(0, "Write a resumable checkpoint every so many steps; 0 writes only the final model.")
    resume: bool = _arg(False, "Continue from the newest checkpoint in output_dir.")
    tensorboard: bool = _arg(False, "Also write TensorBoard event files to output_dir/tensorboard.")

    def __post_init__(self) -> None:
        for name in ("learning_rate", "temperature", "value_learning_rate", "clip", "value_clip", "beta", "lora_alpha"):
            _check(self, name, lambda v: v > 0, "a number > 0")
        for name in (
            "weight_decay",
            "max_grad_norm",
            "kl_coef",
            "label_smoothing",
            "center_coef",
            "score_clip",
            "value_coef",
        ):
            _check(self, name, lambda v: v >= 0, "a number >= 0")
        for name in ("warmup_steps", "save_steps", "eval_steps", "lora_rank"):
            _check(self, name, lambda v: v >= 0, "an integer >= 0")
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
            _check(self, name, lambda v: v >= 1, "an integer >= 1")
        _check(self, "top_k", lambda v: v >= 0, "an integer >= 0")
        _check(self, "top_p", lambda v: 0 < v <= 1, "a number in (0, 1]")
        for name in ("gamma", "lam"):
            _check(self, name, lambda v: 0 <= v <= 1, "a number in [0, 1]")
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


def _check(config: Any, name: str, holds: Any, expected: str) -> None:
    value = getattr(config, name, None)
    if value is not None and not holds(value):
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def _check_groups(config: Any) -> None:
    if config.group_size < 2 or config.batch_size % config.group_size:
        raise ValueError(f"group_size: expected >= 2 and a divisor of batch_size, got {config.group_size}")


@dataclass(frozen=True, kw_only=True)
class SFTConfig(StageConfig):
    """Supervised fine-tuning on prompt + completion rows or on messages."""

    train_data: str = _required("JSONL(.gz), Parquet or `datasets` directory with prompt+completion, or messages.")
    eval_data: str | None = _arg(None, "Same format; its loss is reported at the end of every epoch.")
    epochs: int = _arg(1, "Passes over the data.")
    batch_size: int = _arg(16, "Rows per optimizer step.")
    micro_batch_size: int | None = _arg(None, "Rows per forward pass; default: the whole batch.")
    max_length: int = _arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = _arg(256, "Longest prompt in tokens.")
    fused_head: bool = _arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    learning_rate: float = _arg(1e-5, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")


@dataclass(frozen=True, kw_only=True)
class RewardConfig(StageConfig):
    """Reward model from preference pairs (Bradley-Terry) or K-wise rankings, initialised from the SFT model."""

    train_data: str = _required("Rows with prompt+chosen+rejected(+margin), or prompt+completions+ranks.")
    eval_data: str | None = _arg(None, "Held-out rows of the same format; pair accuracy is reported.")
    epochs: int = _arg(1, "Passes over the data.")
    batch_size: int = _arg(16, "Pairs (or rankings) per optimizer step.")
    micro_batch_size: int | None = _arg(None, "Pairs (or rankings) per forward pass; default: the whole batch.")
    max_length: int = _arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = _arg(256, "Longest prompt in tokens.")
    center_coef: float = _arg(0.0, "Weight of mean((r_chosen + r_rejected)^2), which keeps scores near 0.")
    normalize_samples: int = _arg(256, "Samples of the SFT model whose mean score is shifted to 0; 0 leaves it.")
    max_response_length: int = _arg(64, "Longest of those samples in tokens.")


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(StageConfig):
    """What every method takes that samples from its policy."""

    train_data: str = _required("Rows with a prompt column; extra columns go to a Python reward function.")
    reward: str = _required("Reward-model directory, or a function `package.module:name` or `file.py:name`.")
    reference: str | None = _arg(None, "Reference model of the KL penalty; default: `model` as it is at the start.")
    eval_data: str | None = _arg(None, "Held-out prompts, sampled and scored every eval_steps.")
    eval_reward: str | None = _arg(None, "Reward for evaluation only (a ground truth, say); default: `reward`.")
    eval_steps: int = _arg(0, "Evaluate every so many steps, and before and after; 0 never does.")
    steps: int = _arg(100, "Rollout + update rounds.")
    batch_size: int = _arg(32, "Sampled completions per round.")
    micro_batch_size: int | None = _arg(None, "Completions per forward pass; default: as many as the batch allows.")
    max_prompt_length: int = _arg(256, "Longest prompt in tokens; longer ones lose their left end.")
    max_response_length: int = _arg(64, "Longest completion in tokens.")
    temperature: float = _arg(1.0, "Sampling temperature; also applied in every training pass.")
    top_k: int = _arg(0, "Draw from the k likeliest tokens, in evaluations too; 0: from all.")
    top_p: float = _arg(1.0, "Draw from the likeliest tokens that hold this probability, in evaluations too; 1: all.")
    fused_head: bool = _arg(
        True,
        "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits. So do top_k and top_p, "
        "whatever this says: their training passes see the very tokens that were drawn from, V / 8 bytes a place.",
    )
    kl_coef: float = _arg(0.05, "Weight of the per-token KL penalty in the reward (k1 estimate).")
    kl_target: float | None = _arg(None, "Adapt kl_coef towards this KL per completion in nats; default: fixed.")
    share_base: bool = _arg(
        False, "Reward (and value) model as adapters on the policy's base: one frozen model for all; needs lora_rank."
    )
    offload: bool = _arg(False, "Reference and reward model wait in CPU memory for their phase; no effect on a CPU.")
    missing_eos_penalty: float = _arg(0.0, "Subtracted from the score of a completion that never ends.")
    max_logprob_drift: float | None = _arg(
        None, "Fail when decode- and training-time log-probs differ by more; default: 0.01, or 0.5 in bf16."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """PPO with policy, value, reward and reference models (Schulman et al. 2017; Ziegler et al. 2019)."""

    learning_rate: float = _arg(3e-6, "Peak learning rate of the policy.")
    critic: Critic = _arg("model", "A value model of its own, or a value head on the policy's trunk.")
    value_coef: float = _arg(0.1, "Weight of the value loss in the joint backward pass of a shared critic.")
    value_model: str | None = _arg(None, "Value model to start from; default: the reward model, else `model`.")
    value_learning_rate: float = _arg(1e-5, "Peak learning rate of the value model, or of a shared critic's head.")
    epochs: int = _arg(4, "Passes over each rollout.")
    minibatches: int = _arg(1, "Optimizer steps per pass.")
    clip: float = _arg(0.2, "The probability ratio is clipped to [1 - clip, 1 + clip].")
    value_clip: float = _arg(0.2, "New values are clipped to the old value +- this.")
    gamma: float = _arg(1.0, "Discount.")
    lam: float = _arg(0.95, "GAE lambda.")
    whiten_rewards: bool = _arg(False, "Divide the shaped rewards by their standard deviation.")

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

    learning_rate: float = _arg(1e-6, "Peak learning rate of the policy.")
    greedy_response_length: int | None = _arg(
        None, "End greedy completions at this many tokens (ReMax-fast); default: max_response_length."
    )
    variant: RemaxVariant = _arg("official", "Per-token weights: the authors' code, the paper, or verl's form.")
    gamma: float = _arg(1.0, "Discount of the official variant (its scripts use 0.99).")
    score_clip: float = _arg(5.0, "The score difference is clipped to +- this (official, paper); 0 does not.")


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(OnlineConfig):
    """REINFORCE without a baseline (Williams 1992), the yardstick of ReMax."""

    learning_rate: float = _arg(1e-6, "Peak learning rate of the policy.")
    gamma: float = _arg(1.0, "Discount of the score towards earlier tokens.")


@dataclass(frozen=True, kw_only=True)
class RLOOConfig(OnlineConfig):
    """RLOO: each sample's baseline is the mean of the others of its prompt (arXiv 2402.14740)."""

    learning_rate: float = _arg(1e-6, "Peak learning rate of the policy.")
    group_size: int = _arg(4, "Samples per prompt; batch_size counts samples.")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """GRPO: scores whitened within each prompt's group, PPO's clipped loss, KL in the loss (arXiv 2402.03300)."""

    learning_rate: float = _arg(1e-6, "Peak learning rate of the policy.")
    group_size: int = _arg(8, "Samples per prompt; batch_size counts samples.")
    kl_coef: float = _arg(0.04, "Weight of the per-token KL to the reference in the loss (k3 estimate).")
    epochs: int = _arg(1, "Passes over each rollout.")
    minibatches: int = _arg(1, "Optimizer steps per pass.")
    clip: float = _arg(0.2, "The probability ratio is clipped to [1 - clip, 1 + clip].")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_groups(self)


@dataclass(frozen=True, kw_only=True)
class DPOConfig(StageConfig):
    """Direct preference optimisation (arXiv 2305.18290): no reward model, no sampling."""

    learning_rate: float = _arg(1e-6, "Peak learning rate of AdamW (betas 0.9, 0.95; eps 1e-8).")
    train_data: str = _required("Rows with prompt+chosen+rejected.")
    reference: str | None = _arg(None, "Reference model; default: `model` as it is at the start.")
    beta: float = _arg(0.1, "Strength of the implicit KL constraint.")
    loss_type: DPOLossType = _arg("sigmoid", "Loss on the log-ratio difference, named as in TRL.")
    label_smoothing: float = _arg(0.0, "Probability that a label is flipped (cDPO, robust).")
    epochs: int = _arg(1, "Passes over the data.")
    batch_size: int = _arg(16, "Pairs per optimizer step.")
    micro_batch_size: int | None = _arg(None, "Pairs per forward pass; default: the whole batch.")
    fused_head: bool = _arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    max_length: int = _arg(512, "Longest prompt + completion in tokens; longer prompts lose their left end.")
    max_prompt_length: int = _arg(256, "Longest prompt in tokens.")
    eval_data: str | None = _arg(None, "Held-out prompts, sampled and scored every eval_steps.")
    eval_reward: str | None = _arg(None, "Reward that scores them: a directory or a Python function.")
    eval_steps: int = _arg(0, "Evaluate every so many steps, and before and after; 0 never does.")
    max_response_length: int = _arg(64, "Longest completion sampled in evaluation, in tokens.")


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """A tokenizer trained on text columns and a model with random weights, as one checkpoint directory."""

    model_config: str = _required("JSON file with a transformers model config; needs model_type.")
    data: list[str] = _required("JSONL(.gz), Parquet or `datasets` directories to train BPE on.")
    text_columns: list[str] = _required("Columns of text, or of messages, to train it on.")
    output_dir: str = _required("Checkpoint directory to write.")
    vocab_size: int = _arg(4096, "Tokens, the special ones included.")
    seed: int = _arg(0, "Seed of the weights.")
    max_rows: int | None = _arg(None, "Use only the first so many rows of each file.")

    def __post_init__(self) -> None:
        for name in ("data", "text_columns"):
            _check(self, name, bool, "at least one")
        _check(self, "max_rows", lambda v: v >= 1, "an integer >= 1")


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Preference pairs: two samples of a model per prompt, labelled by Bradley-Terry on a reward."""

    model: str = _required("Checkpoint directory or hub name to sample from.")
    prompts: str = _required("Rows with a prompt column.")
    reward: str = _required("Reward-model directory, or a function `package.module:name` or `file.py:name`.")
    output: str = _required("JSONL file (.jsonl or .jsonl.gz) to write: prompt, chosen, rejected.")
    scale: float = _arg(1.0, "P(a preferred) = sigmoid(scale * (reward(a) - reward(b))).")
    eval_output: str | None = _arg(None, "Second file, for the pairs of the last eval_rows prompts.")
    eval_rows: int = _arg(0, "Prompts whose pairs are held out into eval_output.")
    max_rows: int | None = _arg(None, "Use only the first so many prompts.")
    batch_size: int = _arg(64, "Prompts sampled at once.")
    max_prompt_length: int = _arg(256, "Longest prompt in tokens; longer ones lose their left end.")
    max_response_length: int = _arg(64, "Longest completion in tokens.")
    temperature: float = _arg(1.0, "Sampling temperature.")
    seed: int = _arg(0, "Seed of sampling and labelling.")

    def __post_init__(self) -> None:
        if bool(self.eval_rows) != bool(self.eval_output):
            raise ValueError(f"eval_rows: expected both it and eval_output, or neither, got {self.eval_rows}")


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How much memory a run needs, by role and phase, from the models' configs alone; no weights are loaded."""

    model: str = _required("Checkpoint directory, config.json or hub name of the trained model.")
    method: Method = _required("Training method.")
    out: str | None = _arg(None, "JSON file to write the plan to.")
    explain: bool = _arg(False, "Show the arithmetic behind every figure.")
    measure: bool = _arg(False, "Also run the real stage on this CPU, random weights and tokens, and compare.")
    batch_size: int = _arg(8, "Rows (reward, dpo: pairs) per GPU and optimizer step; rollouts decode them all at once.")
    micro_batch_size: int | None = _arg(None, "Rows (pairs) per forward pass; default: the whole batch.")
    prompt_length: int = _arg(256, "Tokens of a prompt.")
    response_length: int = _arg(256, "Tokens of a response.")
    group_size: int = _arg(4, "Samples per prompt of rloo and grpo; batch_size counts samples.")
    minibatches: int = _arg(1, "Optimizer steps per pass over a batch (ppo, grpo).")
    critic: str = _arg("same", "Value model of ppo: `same` as the reward model, `shared` trunk, or its config.")
    reward: str | None = _arg(None, "Reward model's config, or `none` for a Python function; default: as the model.")
    reference: str | None = _arg(None, "Reference model's config; default: as the model.")
    lora_rank: int = _arg(0, "Train LoRA adapters of this rank on all linear layers but the head; 0: all weights.")
    share_base: bool = _arg(False, "Reward and value model as adapters on the policy's base; needs lora_rank.")
    optimizer: Optimizer = _arg("adamw", "AdamW, or with states of one byte (bitsandbytes).")
    optimizer_in_backward: bool = _arg(False, "Step each weight in backward and free its gradient.")
    dtype: Literal["fp32", "bf16"] = _arg(
        "fp32", "Weights and gradients; bf16 keeps fp32 master weights with the optimizer (16 bytes a parameter too)."
    )
    bf16: bool = _arg(False, "Run forward and backward passes in bfloat16 autocast over fp32 weights.")
    gradient_checkpointing: bool = _arg(False, "Recompute activations in backward to save memory.")
    fused_head: bool = _arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    offload: bool = _arg(False, "Reference and reward model wait in CPU memory for their phase.")
    offload_optimizer: bool = _arg(False, "Optimizer states and gradients live in CPU memory (ZeRO-Offload).")
    gpus: int = _arg(1, "GPUs that share the run.")
    zero: Literal[0, 1, 2, 3] = _arg(
        0, "ZeRO stage over the GPUs: optimizer (1), gradients (2; FSDP grad_op), weights (3; FSDP full) are split."
    )
    frozen_zero: Literal[0, 3] | None = _arg(None, "The same for frozen models; default: 3 with zero 3, else 0.")
    memory: str | None = _arg(None, "Memory of a GPU of your own: bytes, or with a unit as in 24GiB.")
    device: Literal["auto", "cpu", "cuda"] = _arg(
        "auto", "Whose buffers to plan with; auto: what this machine has. Verdicts on GPUs are always CUDA's."
    )

    def __post_init__(self) -> None:
        names = (
            "batch_size",
            "micro_batch_size",
            "prompt_length",
            "response_length",
            "group_size",
            "minibatches",
            "gpus",
        )
        for name in names:
            _check(self, name, lambda v: v >= 1, "an integer >= 1")
        _check(self, "lora_rank", lambda v: v >= 0, "an integer >= 0")
        if self.batch_size % self.minibatches:
            raise ValueError(f"minibatches: expected a divisor of batch_size={self.batch_size}, got {self.minibatches}")
        if self.method in ("rloo", "grpo") and self.batch_size % self.group_size:
            raise ValueError(f"group_size: expected a divisor of batch_size={self.batch_size}, got {self.group_size}")
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")
        if self.bf16 and self.dtype == "bf16":
            raise ValueError("bf16: expected autocast over fp32 weights, got it with dtype=bf16, which needs none")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Methods, critics and LoRA side by side: time, memory and reward on one model with the same token budget.

    Every run has a process of its own. PPO takes one pass over each rollout unless `options` says otherwise.
    """

    model: str = _arg("demo", "demo, 10M, 60M, opt-1.3b, llama-2-7b (random weights but demo), or a checkpoint.")
    output_dir: str = _required("Directory for compare.json, compare.md, plots and a folder per run.")
    methods: list[str] = field(
        default_factory=lambda: ["ppo", "remax", "reinforce", "rloo", "grpo", "dpo"],
        metadata={"help": "Methods to compare."},
    )
    critics: list[str] = field(
        default_factory=lambda: ["same", "small", "shared"],
        metadata={"help": "PPO's value models: as large as the reward model, small, or a head on the policy's trunk."},
    )
    lora_rank: int = _arg(0, "Also compare with LoRA of this rank, all roles on one base; 0: only full training.")
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "Seeds; tables hold medians over them."})
    steps: int = _arg(6, "Rollout + update rounds of a run; the first two are not timed.")
    batch_size: int = _arg(32, "Completions per round; DPO takes half as many pairs.")
    micro_batch_size: int | None = _arg(None, "Completions (DPO: pairs) per forward pass; default: the whole batch.")
    prompt_length: int = _arg(64, "Longest prompt in tokens; the random-weight models' are all this long.")
    response_length: int = _arg(64, "Longest completion in tokens.")
    group_size: int = _arg(4, "Samples per prompt of RLOO and GRPO.")
    bf16: bool = _arg(False, "Run forward and backward passes in bfloat16 autocast.")
    gradient_checkpointing: bool = _arg(False, "Recompute activations in backward to save memory.")
    memory: str | None = _arg(None, "Say the largest batch that fits (24GiB); on a GPU also the most a run may take.")
    reward: str | None = _arg(None, "Reward model of a checkpoint of your own, or a Python function.")
    reward_adapter: str | None = _arg(None, "LoRA reward model on its base, for lora_rank.")
    small_critic: str | None = _arg(None, "Smaller model with its tokenizer, for the small critic.")
    train_data: str | None = _arg(None, "Prompts for it.")
    pairs: str | None = _arg(None, "Preference pairs for it, for DPO.")
    options: dict[str, dict[str, Any]] = field(
        default_factory=dict,
        metadata={"help": "Further keys of the stages' configs, by method, or for all of them under `common`."},
    )
    resume: bool = _arg(False, "Skip the runs that finished.")

    def __post_init__(self) -> None:
        for name in ("methods", "critics", "seeds"):
            _check(self, name, bool, "at least one")
        _check(self, "critics", lambda v: set(v) <= {"same", "small", "shared"}, "some of same, small, shared")
        for name in ("steps", "batch_size", "micro_batch_size", "prompt_length", "response_length", "group_size"):
            _check(self, name, lambda v: v >= 1, "an integer >= 1")
        _check(self, "lora_rank", lambda v: v >= 0, "an integer >= 0")
        for section in self.options:
            if section != "common" and section not in self.methods:
                raise ValueError(f"options: expected sections common, {', '.join(self.methods)}, got {section!r}")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """SFT -> reward model -> every named method from the same start on the same prompts, then a report.

    The sections hold the stages' own keys; `model`, `output_dir`, `reward` and `seed` are filled in where left out.
    """

    model: str = _required("Checkpoint directory or hub name SFT starts from.")
    output_dir: str = _required("Each stage writes to a folder of its own in here; report.html ties them together.")
    methods: list[str] = field(
        default_factory=lambda: ["ppo", "remax", "reinforce", "rloo", "dpo"],
        metadata={"help": "Methods to run after the reward model."},
    )
    seed: int = _arg(0, "Seed of every stage that does not set its own.")
    title: str = _arg("RLHF pipeline", "Title of the report.")
    resume: bool = _arg(False, "Skip stages that finished; continue the one that was cut off.")
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

    output_dir: str = _arg("demo_out", "Where models, metrics and report.html go.")
    seed: int = _arg(0, "Seed of data, models and sampling; same seed, same bits.")
    quick: bool = _arg(False, "A tenth of the steps: shows that everything runs, proves nothing.")
    resume: bool = _arg(False, "Skip what an earlier, interrupted demo in output_dir finished.")


@dataclass(frozen=True, kw_only=True)
class LinearBanditConfig:
    """DPO, RMB-PO and RMB-PO+ on the linear bandit of arXiv 2312.10584, over many seeds, beside the published figures.

    RMB-PO learns a reward from the n preferences and optimises it on their states, RMB-PO+ on m more states too.
    """

    out: str = _required("JSON file of the results; the plots go beside it.")
    mode: Literal["faithful", "exact"] = _arg(
        "faithful", "The published optimisers and step counts, or the global optimum of every objective."
    )
    setting: Literal["matched", "mismatched"] = _arg(
        "matched", "The policy's features: the reward's, or these with sine and cosine swapped."
    )
    n: int = _arg(20, "Preferences.")
    ratios: list[float] = field(
        default_factory=lambda: [0.5, 2.0, 5.0, 10.0], metadata={"help": "m/n of RMB-PO+, each a method of its own."}
    )
    beta: float = _arg(0.01, "Strength of the KL to the uniform policy.")
    seeds: int = _arg(60, "Runs, each with data and starts of its own that all methods share.")
    first_seed: int = _arg(2021, "The first of them.")
    pref_states: bool = _arg(True, "RMB-PO+ trains on the preferences' states too, as the published code does.")
    sizes: list[int] = field(
        default_factory=lambda: [10, 20, 40], metadata={"help": "n of the plot of the gap against n; [] for none."}
    )

    def __post_init__(self) -> None:
        for name in ("n", "first_seed"):
            _check(self, name, lambda v: v >= 1, "an integer >= 1")
        _check(self, "seeds", lambda v: v >= 2, "an integer >= 2")
        _check(self, "beta", lambda v: v > 0, "a number > 0")
        for name in ("ratios", "sizes"):
            _check(self, name, lambda v: all(x > 0 for x in v) and len(set(v)) == len(v), "distinct numbers > 0")
        if not self.pref_states:
            _check(self, "ratios", lambda v: all(int(x * n) >= 1 for x in v for n in (self.n, *self.sizes)), "m >= 1")
