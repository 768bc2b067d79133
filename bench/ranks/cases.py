"""Shapes, stages and settings. Every contender trains the same stage on the same rows from the same models."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_fast.data.rows import load_rows, write_rows
from rlhf_fast.lab.compare import start
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.start import SHAPES, Shape, llama
from rlhf_fast.methods import STAGES, load

MAIN = ("sft", "dpo", "ppo", "remax")


class Case(NamedTuple):
    """A shape and what its stages take. rows: of a batch (DPO: half as many pairs). tokens: of prompt and of response.

    turn: steps that a contender takes in a turn.
    """

    name: str
    shape: Shape
    rows: int
    tokens: int
    turn: int


TOY = Case("toy", Shape(llama(32, 64, 2, 2, 2), llama(32, 64, 1, 2, 2), 300), 8, 8, 2)
CPU_CASES = (Case("10M", SHAPES["10M"], 32, 64, 2), Case("60M", SHAPES["60M"], 16, 64, 1))
_LARGE = llama(1536, 8960, 28, 12, 2)
CUDA_CASES = (Case("Qwen2.5-1.5B shape", Shape(_LARGE, _LARGE, 151936), 128, 256, 2),)


def cases(device: str, quick: bool) -> tuple[Case, ...]:
    """The cases of a device."""
    return (TOY,) if quick else CUDA_CASES if device == "cuda" else CPU_CASES


class Files(NamedTuple):
    """The models and rows of a case, as paths."""

    model: str
    reward: str
    rows: dict[str, str]  # kind of rows, as in the table of stages -> file


def prepare(case: Case, directory: Path, steps: int) -> Files:
    """Makes the models and the rows for so many steps in `directory`."""
    lengths = {"prompt_length": case.tokens, "response_length": case.tokens}
    made = start.untrained(directory, case.shape, CompareConfig(model="60M", output_dir=str(directory), **lengths))
    assert made.pairs is not None
    pairs = load_rows(made.pairs, "preference")[: case.rows * min(steps, 4)]
    completions = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in pairs]
    labelled = [{**row, "label": i % 2 == 0} for i, row in enumerate(completions)]
    files = {"prompt": made.prompts}
    for kind, rows in (("sft", completions), ("preference", pairs), ("unpaired", labelled)):
        files[kind] = str(directory / f"{kind}.jsonl")
        write_rows(files[kind], rows)
    return Files(made.model, made.reward, files)


def spec(case: Case, stage: str, files: Files, steps: int, **options: Any) -> dict[str, Any]:
    """The stage and its options, for at least so many steps. options: further ones of the stage's config."""
    row = STAGES[stage]
    batch = case.rows // 2 if row.rows == "preference" else case.rows
    number = 0 if row.rows == "prompt" else len(load_rows(files.rows[row.rows], row.rows))
    values: dict[str, Any] = {
        "model": files.model,
        "train_data": files.rows[row.rows],
        "reward": files.reward,
        "batch_size": batch,
        "steps": steps,
        "epochs": -(-steps * batch // number) if number else 1,
        "save_steps": 0,
        "normalize_samples": 0,
        "group_size": 2,
        "learning_rate": 1e-7,  # random weights drift with any learning rate, and completions would change their length
        "lr_schedule": "constant",
        "max_prompt_length": case.tokens,
        "max_response_length": case.tokens,
        "max_length": 2 * case.tokens,
        **options,
    }
    fields = {field.name for field in dataclasses.fields(load(row.config))}
    return {"stage": stage, "options": {name: value for name, value in values.items() if name in fields}}


def write_spec(path: Path, wanted: dict[str, Any], **more: Any) -> Path:
    """Writes the file that a process reads; its run goes to a directory beside the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    options = wanted["options"] | {"output_dir": str(path.with_suffix(""))}
    path.write_text(json.dumps({**wanted, "options": options, **more}))
    return path
