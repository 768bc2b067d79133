"""The comparison's config; as in `rlhf_fast.config`, only values and checks of them."""

from dataclasses import dataclass
from typing import Any

from rlhf_fast.config.fields import arg, check, check_fields, required
from rlhf_fast.config.stages import DTYPE_HELP, TRUST_REMOTE_CODE_HELP, Dtype, check_precision
from rlhf_fast.methods import METHODS


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Methods, critics and LoRA side by side: time, memory and reward on one model with the same token budget.

    Every run has a process of its own. PPO takes one pass over each rollout unless `options` says otherwise.
    """

    model: str = arg(
        "demo",
        "demo, 10M (8.4M weights), 60M (58M), opt-1.3b or llama-2-7b (random weights but for demo), or a checkpoint.",
    )
    trust_remote_code: bool = arg(False, TRUST_REMOTE_CODE_HELP)
    output_dir: str = required("Directory for compare.json, compare.md, plots and a folder per run.")
    methods: list[str] = arg(list(METHODS), "Methods to compare.")
    critics: list[str] = arg(
        ["same", "small", "shared"],
        "PPO's value models: as large as the reward model, small, or a head on the policy's trunk.",
    )
    lora_rank: int = arg(
        0, "Also compare with LoRA of this rank, all roles on one base; 0: only full training.", at_least=0
    )
    seeds: list[int] = arg([0], "Seeds; tables hold medians over them.")
    steps: int = arg(6, "Rollout + update rounds of a run; the first two are not timed.", at_least=1)
    batch_size: int = arg(32, "Completions per round; DPO takes half as many pairs.", at_least=1)
    micro_batch_size: int | None = arg(
        None, "Completions (DPO: pairs) per forward pass; default: the whole batch.", at_least=1
    )
    prompt_length: int = arg(64, "Longest prompt in tokens; the random-weight models' are all this long.", at_least=1)
    response_length: int = arg(64, "Longest completion in tokens.", at_least=1)
    group_size: int = arg(4, "Samples per prompt of methods with groups (RLOO, GRPO).", at_least=1)
    dtype: Dtype = arg("fp32", DTYPE_HELP)
    bf16: bool = arg(False, "Run forward and backward passes in bfloat16 autocast, over fp32 weights.")
    gradient_checkpointing: bool = arg(False, "Recompute activations in backward to save memory.")
    memory: str | None = arg(None, "Report the largest batch that fits (24GiB); on a GPU a run may take no more.")
    reward: str | None = arg(None, "Reward model of a checkpoint of your own, or a Python function.")
    reward_adapter: str | None = arg(None, "LoRA reward model on the base of your checkpoint; lora_rank needs it.")
    small_critic: str | None = arg(None, "Smaller model with the same tokenizer, for the small critic.")
    train_data: str | None = arg(None, "Prompts to train a checkpoint of your own on.")
    pairs: str | None = arg(None, "Preference pairs to train a checkpoint of your own on, for offline methods.")
    options: dict[str, dict[str, Any]] = arg(
        {}, "Further keys of the stages' configs, by method, or for all of them under `common`."
    )
    resume: bool = arg(False, "Skip the runs that finished.")

    def __post_init__(self) -> None:
        check_fields(self)
        check_precision(self)
        for name in ("methods", "critics", "seeds"):
            check(self, name, bool, "at least one")
        check(self, "critics", lambda v: set(v) <= {"same", "small", "shared"}, "some of same, small, shared")
        for name in self.methods:
            if name not in METHODS:
                raise ValueError(f"methods: expected some of {', '.join(METHODS)}, got {name!r}")
        for section in self.options:
            if section != "common" and section not in self.methods:
                raise ValueError(f"options: expected sections common, {', '.join(self.methods)}, got {section!r}")
