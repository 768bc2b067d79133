"""Stages for tests: their table, small configs, a reward, what a run leaves behind."""

import dataclasses
import json
import shutil
from importlib import import_module
from pathlib import Path

import torch
from safetensors.torch import load_file

from rlhf_fast import methods
from rlhf_fast.training import checkpoint
from rlhf_fast.training.metrics import read_metrics


def write_rows(path: Path, rows: list[dict]) -> str:
    """The path of a new file of JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def shortness(prompts, completions):
    """A reward a tiny model climbs in a few steps: few words, and among them 'good'."""
    return [("good" in c.split()) - 0.1 * len(c.split()) for c in completions]


def constant(prompts, completions):
    """A reward that prefers nothing."""
    return [0.0] * len(completions)


def parity(prompts, completions):
    """A reward that is the same for both samples of about every second prompt."""
    return [float(len(c) % 2) for c in completions]


REWARD, PARITY = (f"{__file__}:{name}" for name in ("shortness", "parity"))
_FILES = {"sft": "sft", "preference": "pairs", "unpaired": "unpaired", "prompt": "prompts"}  # kind of rows -> file
LENGTHS = {"max_prompt_length": 16, "max_response_length": 12}


def stage_config(cls: type, files: dict[str, str], model: str, output: Path, **options):
    """A config of class `cls`: four steps of 16 rows out of `files`, unless `options` say otherwise."""
    fields = {f.name for f in dataclasses.fields(cls)}
    data = _FILES[next(row.rows for row in methods.STAGES.values() if issubclass(cls, methods.load(row.config)))]
    values = {"batch_size": 16, "steps": 4, "learning_rate": 2e-3, "lr_schedule": "constant", "reward": REWARD}
    values = {k: v for k, v in (values | LENGTHS).items() if k in fields}
    return cls(**{**values, "model": model, "output_dir": str(output), "train_data": files[data], **options})


STAGES = {
    name: (import_module(f"rlhf_fast.{row.train.partition(':')[0]}"), methods.load(row.config))
    for name, row in methods.STAGES.items()
}
"""Command -> module and config class of every training stage."""


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """Every tensor that a run saved, its critic's too, in the order of their names."""
    found = {}
    for place in (directory, directory / "value"):
        tensors = {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}
        found |= {f"{place.name}/{name}": tensors[name] for name in sorted(tensors)}
    return found


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest absolute difference of two sets of tensors."""
    assert a.keys() != set() and len(a) == len(b)
    return max((x - y).abs().max().item() for x, y in zip(a.values(), b.values(), strict=True))


def interrupted(whole: Path, cut: Path) -> Path:
    """`cut`, with what an interruption after the last checkpoint of the run `whole` would have left behind."""
    last = checkpoint.latest(whole)
    shutil.copytree(last, cut / last.name)
    shutil.copy(whole / "metrics.jsonl", cut)
    return cut


def numbers(directory: Path) -> list[dict]:
    """The metrics of every step but the measured times and peaks."""
    rows = read_metrics(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "memory/"))} for row in rows]
