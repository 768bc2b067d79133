"""What the planner says against what a run holds: the real stage on the CPU, every live tensor's bytes counted.

The stage runs two steps on random weights of the configured shapes and on random tokens: prompts and answers of full
length but for one token in every other prompt (real batches are ragged, and without padding attention takes another
path), no end of sequence in the samples. Needs the memory and the time that the plan is about: for small shapes.

A plan for several GPUs runs in as many processes, which torchrun starts. Every process calls `measure`.
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
from rlhf_fast.ranks import announced, current
from rlhf_fast.training import checkpoint
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.memory import tensors_in
from rlhf_fast.training.metrics import print_table
from rlhf_fast.training.tensor_bytes import TensorBytes

_DATA, _HELD_OUT = "data.jsonl", "held_out.jsonl"
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
    "shard",
)


def compare(planner: Planner) -> list[dict[str, dict[str, int]]]:
    """Run, print and return {phase: {"planned", "measured"}} of every process: bytes of live tensors at the peak."""
    planned, found = planner.processes("cpu"), []
    for phases, run in zip(planned, measure(planner), strict=True):
        peaks = {name: phase["peak_bytes"] for name, phase in run["phases"].items() if isinstance(phase, dict)}
        found.append({name: {"planned": phases[name].peak_bytes, "measured": size} for name, size in peaks.items()})
    several = len(found) > 1
    rows = [
        ({"process": rank} if several else {})
        | {"phase": name, "planned bytes": row["planned"], "measured bytes": row["measured"]}
        | {"planned / measured": f"{row['planned'] / row['measured']:.3f}"}
        for rank, process in enumerate(found)
        for name, row in process.items()
    ]
    print_table("Live tensors on this CPU, at each phase's peak", rows)
    return found


def measure(planner: Planner) -> list[dict[str, Any]]:
    """A real run of two steps: what every process held, as the `processes` of a run.json.

    Raises ValueError for what runs on a CPU cannot show, and where there are not as many processes as GPUs.
    """
    plan = planner.plan
    shown = {"gpus": announced()[1], "zero": 0, "offload": False, "offload_optimizer": False}
    for name, needed in shown.items():
        if getattr(plan, name) != needed:
            raise ValueError(f"measure: expected {name}={needed}, got {getattr(plan, name)}")
    ranks = current()
    with tempfile.TemporaryDirectory() as own:
        directory = Path(ranks.gather(own)[0])
        if ranks.first:
            _prepare(planner, directory)
        ranks.wait()
        config = _config(planner, directory)
        load(plan.stage.train)(config, listeners=[_Counts()])
        run = json.loads((Path(config.output_dir) / "run.json").read_text())
        ranks.wait()  # the first process removes the directory
    return run.get("processes") or [{name: run[name] for name in ("static_bytes", "phases")}]


def _prepare(planner: Planner, directory: Path) -> None:
    """Writes models and data to `directory`."""
    plan = planner.plan
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
    rows = _rows(plan)
    (directory / _DATA).write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = itertools.islice(itertools.cycle(rows), plan.eval_rows)
    held_out = "".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in prompts)
    (directory / _HELD_OUT).write_text(held_out)


def _config(planner: Planner, directory: Path) -> StageConfig:
    """The stage's config for what `_prepare` has written."""
    plan, config_class = planner.plan, load(planner.stage.config)
    names = config_class.__dataclass_fields__
    length = plan.prompt_length + plan.response_length
    values = {name: getattr(plan, name) for name in SAME}
    values |= {"max_prompt_length": plan.prompt_length, "steps": 2, "normalize_samples": 0}
    values |= {"epochs": 1 if planner.stage.online else 2}
    values |= {"max_length": length, "max_response_length": plan.response_length}
    values |= {"reward": str(directory / "reward") if "reward" in planner.roles else f"{__name__}:no_reward"}
    if plan.eval_rows:
        values |= {"eval_data": str(directory / _HELD_OUT)}
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
        train_data=str(directory / _DATA),
        **{name: value for name, value in values.items() if name in names},
    )


class _Counts(Listener):
    """Counts every live tensor's bytes as long as the run lasts; loading models is left out, because it takes time."""

    def __init__(self) -> None:
        self.counter = TensorBytes()

    def begin(self, run: Any) -> None:
        self.counter.__enter__()
        for model in (*run.models.values(), *run.frozen.values()):
            self.counter.hold((*model.parameters(), *model.buffers()))
        for learner in run.learners.values():
            self.counter.hold(tensors_in(learner.optimizer.state))

    def end(self) -> None:
        self.counter.__exit__(None, None, None)


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
