"""What the planner says against what a run holds: the real stage on the CPU, every live tensor's bytes counted.

The stage runs two steps on random weights of the configured shapes and on random tokens: prompts and answers of full
length but for one token in every other prompt (real batches are ragged, and without padding attention takes another
path), no end of sequence in the samples. Needs the memory and the time that the plan is about: for small shapes.
"""

import copy
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_fast.config import StageConfig
from rlhf_fast.data.rows import COLUMNS
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_scorer
from rlhf_fast.methods import load
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.phases import Planner
from rlhf_fast.plan.shapes import Shape
from rlhf_fast.training import checkpoint
from rlhf_fast.training.metrics import print_table
from rlhf_fast.training.tensor_bytes import TensorBytes

SAME = (
    "batch_size",
    "micro_batch_size",
    "minibatches",
    "group_size",
    "dtype",
    "frozen_dtype",
    "bf16",
    "gradient_checkpointing",
    "fused_head",
    "top_k",
    "top_p",
    "lora_rank",
    "share_base",
    "optimizer",
    "optimizer_in_backward",
)


def compare(planner: Planner) -> dict[str, dict[str, int]]:
    """Run, print and return {phase: {"planned", "measured"}}, bytes of live tensors at the phase's peak."""
    planned, measured = planner.phases("cpu"), measure(planner)
    result = {name: {"planned": planned[name].peak_bytes, "measured": size} for name, size in measured.items()}
    rows = [{"phase": name} | {f"{key} bytes": n for key, n in row.items()} for name, row in result.items()]
    for row, (planned_bytes, measured_bytes) in zip(rows, (x.values() for x in result.values()), strict=True):
        row["planned / measured"] = f"{planned_bytes / measured_bytes:.3f}"
    print_table("Live tensors on this CPU, at each phase's peak", rows)
    return result


def measure(planner: Planner) -> dict[str, int]:
    """Phase -> bytes of live tensors at its peak in a real run of two steps.

    Raises ValueError for what runs on a CPU in one process cannot show: other layouts, several GPUs, offloading.
    """
    plan = planner.plan
    shown = {"gpus": 1, "offload": False, "offload_optimizer": False}
    for name, needed in shown.items():
        if getattr(plan, name) != needed:
            raise ValueError(f"measure: expected {name}={needed}, got {getattr(plan, name)}")
    with tempfile.TemporaryDirectory() as directory:
        config = _prepare(planner, Path(directory))
        with TensorBytes():
            load(plan.stage.train)(config)
        run = json.loads((Path(config.output_dir) / "run.json").read_text())
    return {name: phase["peak_bytes"] for name, phase in run["phases"].items() if isinstance(phase, dict)}


def _prepare(planner: Planner, directory: Path) -> StageConfig:
    """Models, data and the stage's config, in `directory`."""
    plan, config_class = planner.plan, load(planner.stage.config)
    vocabulary = min(role.shape.config.get_text_config().vocab_size for role in planner.roles.values())
    # a sampled end would shorten the rollout: where there is one, the end is a token no model has
    end = vocabulary if planner.stage.online else 1
    tokenizer = _tokenizer(vocabulary, end)
    for name, role in planner.roles.items():
        shape = role.shape._replace(head="policy") if name == planner.main else role.shape
        _save_model(shape, directory / name, tokenizer)
    if plan.share_base:  # the reward model then is an adapter on the policy
        adapted = load_scorer(directory / planner.main, lora=LoRA(plan.lora_rank, 16.0, 0))
        checkpoint.save(directory / "reward", models={"": adapted}, tokenizer=tokenizer)
    data = directory / "data.jsonl"
    rows = _rows(plan)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = directory / "held_out.jsonl"
    prompts = itertools.islice(itertools.cycle(rows), plan.eval_rows)
    held_out.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts))
    names = config_class.__dataclass_fields__
    length = plan.prompt_length + plan.response_length
    values = {name: getattr(plan, name) for name in SAME}
    values |= {"max_prompt_length": plan.prompt_length, "steps": 2, "normalize_samples": 0}
    values |= {"epochs": 1 if planner.stage.online else 2}
    values |= {"max_length": length, "max_response_length": plan.response_length}
    values |= {"reward": str(directory / "reward") if "reward" in planner.roles else f"{__name__}:no_reward"}
    if plan.eval_rows:
        values |= {"eval_data": str(held_out)}
        if not planner.stage.online:
            values |= {"eval_reward": f"{__name__}:no_reward"}
    if plan.shared_critic:
        values |= {"critic": "shared"}
    elif not plan.share_base:
        values |= {"value_model": str(directory / "value")}
    if plan.reference_free:
        values |= {"loss_type": "simpo"}
    elif not plan.lora_rank or plan.reference:
        values |= {"reference": str(directory / "reference")}
    if plan.optimizer_in_backward:
        values |= {"max_grad_norm": 0.0}
    return config_class(
        model=str(directory / planner.main),
        output_dir=str(directory / "out"),
        train_data=str(data),
        **{name: value for name, value in values.items() if name in names},
    )


def no_reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward function of a plan without a reward model."""
    return [0.0] * len(prompts)


def _tokenizer(vocabulary: int, end: int) -> PreTrainedTokenizerFast:
    """A word a token: "w0", "w1", ...; w0 pads."""
    words = {f"w{i}": i for i in range(max(vocabulary, end + 1))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="w0", eos_token=f"w{end}")


def _save_model(shape: Shape, directory: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = copy.deepcopy(shape.config)
    config.eos_token_id = None  # else it ends samples beside the tokenizer's
    shape = shape._replace(autocast=False)  # a mixed model comes from a checkpoint in bf16
    checkpoint.save(directory, models={"": shape.instantiate(config)}, tokenizer=tokenizer)


def _rows(plan: PlanConfig) -> list[dict[str, Any]]:
    """One batch; the last token of an answer is its end, which the stages add."""
    generator = torch.Generator().manual_seed(0)

    def words(count: int) -> str:
        return " ".join(f"w{i}" for i in torch.randint(2, 10, (count,), generator=generator).tolist())

    rows = []
    for i in range(plan.batch_size // plan.stage.samples_of(plan.group_size)):
        row = {"prompt": words(plan.prompt_length - i % 2)}
        row |= {name: words(plan.response_length - 1) for name in COLUMNS[plan.stage.rows]}
        rows.append(row | ({"label": i % 2 == 0} if "label" in row else {}))
    return rows
