"""The planner's config; as in `rlhf_fast.config`, only values and checks of them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rlhf_fast.config.fields import arg, check_fields, required
from rlhf_fast.config.sampling import SamplerName
from rlhf_fast.config.stages import (
    DTYPE_HELP,
    SHARD_HELP,
    TRUST_REMOTE_CODE_HELP,
    Dtype,
    Optimizer,
    Shard,
    check_precision,
    check_shard,
    frozen_weights,
)
from rlhf_fast.methods import METHODS, STAGES, Stage

if TYPE_CHECKING:
    Method = str
else:
    Method = Literal[tuple(STAGES)]


@dataclass(frozen=True, kw_only=True)
class PlanConfig:
    """How much memory a run needs, by role and phase, from the models' configs alone; no weights are loaded."""

    model: str = required("Checkpoint directory, config.json or hub name of the trained model.")
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    method: Method = required("Training method.")
    out: str | None = arg(None, "JSON file to write the plan to.")
    explain: bool = arg(False, "Show the arithmetic behind every figure.")
    measure: bool = arg(False, "Also run the real stage on this CPU, random weights and tokens, and compare.")
    batch_size: int = arg(
        8,
        "Rows (reward, dpo: pairs) per optimizer step, of all GPUs together; a GPU decodes its share at once.",
        at_least=1,
    )
    micro_batch_size: int | None = arg(
        None, "Rows (pairs) per forward pass of a GPU; default: all rows that the GPU has.", at_least=1
    )
    eval_rows: int = arg(0, "Held-out prompts of an evaluation, 64 of them at once; 0: no evaluation.", at_least=0)
    prompt_length: int = arg(256, "Tokens of a prompt.", at_least=1)
    response_length: int = arg(256, "Tokens of a response.", at_least=1)
    group_size: int = arg(
        4, "Samples per prompt of methods with groups (rloo, grpo); batch_size counts samples.", at_least=1
    )
    minibatches: int = arg(1, "Optimizer steps per pass over a batch (ppo, grpo).", at_least=1)
    critic: str = arg("same", "Value model of ppo: `same` as the reward model, `shared` trunk, or its config.")
    reward: str | None = arg(None, "Reward model's config, or `none` for a Python function; default: as the model.")
    reference: str | None = arg(None, "Reference model's config; default: as the model.")
    reference_free: bool = arg(False, "The loss has no reference (dpo: sft, cpo, simpo, orpo), so none is loaded.")
    lora_rank: int = arg(
        0, "Train LoRA adapters of this rank on all linear layers but the head; 0: all weights.", at_least=0
    )
    share_base: bool = arg(False, "Reward and value model as adapters on the policy's base; needs lora_rank.")
    optimizer: Optimizer = arg("adamw", "AdamW, or AdamW with states of one byte (bitsandbytes).")
    optimizer_in_backward: bool = arg(False, "Step each weight in backward and free its gradient.")
    dtype: Dtype = arg("fp32", DTYPE_HELP)
    frozen_dtype: Dtype | None = arg(
        None, "Weights of models that are not trained; default: bf16 with dtype bf16 or with bf16, else fp32."
    )
    bf16: bool = arg(False, "Run forward and backward passes in bfloat16 autocast over fp32 weights.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.")
    fused_head: bool = arg(True, "Take losses from hidden states, in chunks; false takes them from [B, T, V] logits.")
    top_k: int = arg(
        0,
        "Rollouts draw from the k likeliest tokens; 0: from all. With top_k or top_p losses come from logits.",
        at_least=0,
    )
    top_p: float = arg(
        1.0, "Rollouts draw from the likeliest tokens that hold this probability; 1: from all.", above=0, at_most=1
    )
    sampler: SamplerName = arg(
        "local", "Who decodes rollouts: this process, or a vLLM server, whose memory is its own."
    )
    offload: bool = arg(False, "Reference and reward model wait in CPU memory for their phase.")
    offload_optimizer: bool = arg(False, "Optimizer states and gradients live in CPU memory (ZeRO-Offload).")
    gpus: int = arg(1, "GPUs that share the run, one for each process.", at_least=1)
    shard: Shard = arg("none", SHARD_HELP)
    machines: int = arg(1, "Machines that the GPUs stand in; hybrid: each has a copy.", at_least=1)
    zero: Literal[0, 1, 2, 3] = arg(
        0,
        "ZeRO stage of another trainer, such as DeepSpeed: optimizer (1), gradients (2) and weights (3) are split.",
    )
    frozen_zero: Literal[0, 3] | None = arg(None, "ZeRO stage of the frozen models; default: 3 with zero 3, else 0.")
    memory: str | None = arg(None, "Memory of a GPU of your own: bytes, or with a unit as in 24GiB.")
    device: Literal["auto", "cpu", "cuda"] = arg(
        "auto",
        "Device whose buffers are planned; auto: this machine's. Verdicts on GPUs always count CUDA's.",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.batch_size % self.minibatches:
            raise ValueError(f"minibatches: expected a divisor of batch_size={self.batch_size}, got {self.minibatches}")
        samples = self.stage.samples_of(self.group_size)
        if self.batch_size % samples and self.stage.samples == "group_size":
            raise ValueError(f"group_size: expected a divisor of batch_size={self.batch_size}, got {samples}")
        if self.batch_size % samples:
            raise ValueError(f"batch_size: expected a multiple of {samples} samples per prompt, got {self.batch_size}")
        prompts = self.batch_size // samples
        if prompts < self.gpus:
            what = "a row" if samples == 1 else f"a prompt with {samples} samples"
            raise ValueError(f"batch_size: expected {what} for each of {self.gpus} GPUs, got {self.batch_size}")
        self._check_shards()
        if self.eval_rows and self.method not in METHODS:
            raise ValueError(f"eval_rows: expected 0 for {self.method}, which samples no prompts, got {self.eval_rows}")
        if self.reference_free and self.method != "dpo":
            raise ValueError(f"reference_free: expected method dpo beside it, got {self.method}")
        if self.reference_free and self.eval_rows:
            raise ValueError(
                f"eval_rows: expected 0 with reference_free, as evaluations have one, got {self.eval_rows}"
            )
        if self.sampler == "vllm" and self.truncated:
            raise ValueError("sampler: expected local with top_k or top_p, which a server does not return; got vllm")
        if self.sampler == "vllm" and self.measure:
            raise ValueError("sampler: expected local with measure, which runs the stage without a server; got vllm")
        if self.share_base and not self.lora_rank:
            raise ValueError("lora_rank: expected > 0 with share_base, since a shared base is frozen; got 0")
        if self.shared_critic and self.truncated:
            raise ValueError("critic: expected a model of its own beside top_k or top_p, which go through the logits")
        check_precision(self)

    def _check_shards(self) -> None:
        if self.gpus % self.machines:
            raise ValueError(f"machines: expected a divisor of gpus={self.gpus}, got {self.machines}")
        if self.machines > 1 and self.shard != "hybrid":
            raise ValueError(f"machines: expected shard hybrid beside it, got {self.machines} with {self.shard}")
        if self.shard != "none" and (self.zero or self.frozen_zero):
            raise ValueError(f"zero: expected 0 with shard={self.shard}, which splits everything; got {self.zero}")
        if self.shard != "none" and self.offload_optimizer:
            raise ValueError(f"offload_optimizer: expected False with shard={self.shard}, got True")
        check_shard(self)

    @property
    def stage(self) -> Stage:
        """The method's row in the table of training stages."""
        return STAGES[self.method]

    @property
    def frozen_weights(self) -> Literal["fp32", "bf16", "mixed"]:
        """As in the stages' configs."""
        return frozen_weights(self)

    @property
    def shared_critic(self) -> bool:
        """The value model is a head on the policy's trunk."""
        return "value" in self.stage.roles and self.critic == "shared"

    @property
    def truncated(self) -> bool:
        """Rollouts keep the sets of tokens that they draw from."""
        return bool(self.top_k or self.top_p < 1)
