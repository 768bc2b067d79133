"""Which runs are compared, and the stage config of each run."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.files import write_text
from rlhf_fast.data.rows import read_rows
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.start import LORA_RATE, Start
from rlhf_fast.methods import METHODS, load
from rlhf_fast.ranks import current

CRITICS: dict[str | None, str] = {"same": "", "small": ", small critic", "shared": ", shared trunk"}


class Cell(NamedTuple):
    """One of the runs that are compared."""

    name: str  # for people
    key: str  # for files
    method: str
    seed: int
    options: dict[str, Any]  # of the stage's config


def cells_of(config: CompareConfig, start: Start) -> list[Cell]:
    """One cell per method, or one per critic for a method with a value model.

    The same again with LoRA where `lora_rank` is set, and all of these once per seed.
    """
    cells = []
    for seed in config.seeds:
        for rank in (0, config.lora_rank) if config.lora_rank else (0,):
            for method in config.methods:
                for critic in config.critics if "value" in METHODS[method].roles else (None,):
                    if critic == "small" and (rank or start.small_critic is None):
                        continue  # with LoRA a critic on the base costs next to nothing
                    key = "-".join(x for x in (method, critic, f"lora{rank}" if rank else "", f"seed{seed}") if x)
                    name = METHODS[method].title + CRITICS.get(critic, "") + (f", LoRA {rank}" if rank else "")
                    cells.append(Cell(name, key, method, seed, _options(config, start, method, critic, rank, seed)))
    return cells


def first_rows(method: str, pairs: str | None, rows: int, config: CompareConfig) -> str:
    """The data of an offline method: as many pairs as its steps take."""
    if pairs is None:
        raise ValueError(f"pairs: expected preference pairs for the method {method}, got none")
    path = Path(config.output_dir) / f"pairs-{method}.jsonl"
    found = [json.dumps(row) for _, row in itertools.islice(read_rows(pairs), rows)]
    if len(found) < rows:
        raise ValueError(f"pairs: expected at least steps * batch_size / 2 = {rows} rows, got {len(found)}")
    if current().first:
        write_text(path, "\n".join(found) + "\n")
    current().wait()
    return str(path)


def _options(
    config: CompareConfig, start: Start, method: str, critic: str | None, rank: int, seed: int
) -> dict[str, Any]:
    row = METHODS[method]
    fields = {f.name for f in dataclasses.fields(load(row.config))}
    lengths = {"prompt_length": config.prompt_length, "response_length": config.response_length}
    lengths |= {k: v for k, v in start.options.get("common", {}).items() if k in lengths}
    batch = config.batch_size // row.sequences  # half as many pairs make the same number of completions
    pairs = config.steps * batch * row.sequences // 2
    options = {
        "model": start.model,
        "reward": start.reward_adapter or start.reward if rank else start.reward,
        "train_data": start.prompts if row.online else first_rows(method, start.pairs, pairs, config),
        "trust_remote_code": config.trust_remote_code,
        "seed": seed,
        "steps": config.steps,
        "batch_size": batch,
        "micro_batch_size": min(config.micro_batch_size, batch) if config.micro_batch_size else None,
        "max_prompt_length": lengths["prompt_length"],
        "max_response_length": lengths["response_length"],
        "max_length": sum(lengths.values()),
        "group_size": config.group_size,
        "dtype": config.dtype,
        "bf16": config.bf16,
        "gradient_checkpointing": config.gradient_checkpointing,
        "lora_rank": rank,
        "share_base": bool(rank and start.reward_adapter),
        "epochs": 1,
        "minibatches": 1,
    }
    if critic == "shared":
        options["critic"] = "shared"
    if critic == "small":
        options["value_model"] = start.small_critic
    fitting = start.options.get("common", {}) | start.options.get(method, {})
    if rank:
        fitting |= {k: v * LORA_RATE for k, v in fitting.items() if k.endswith("learning_rate")}
    wanted = config.options.get("common", {}) | config.options.get(method, {})
    return {k: v for k, v in (fitting | options | wanted).items() if k in fields}
