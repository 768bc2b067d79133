"""PPO against ReMax on 1.3B random weights, made from a config: time, and the phases' peaks beside the plan's.

`rlhf-fast compare` runs both, each in a process of its own; the planner's peaks come from the shapes alone.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.gpu.part import Found, Setting
from bench.gpu.predict import Work, files, processes
from rlhf_fast.config.arguments import from_dict
from rlhf_fast.data.damage import read_json
from rlhf_fast.lab.compare import command
from rlhf_fast.lab.compare.cells import cells_of
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.start import SHAPES, Shape, llama, prepare
from rlhf_fast.methods import METHODS, load
from rlhf_fast.plan.command import plan_of
from rlhf_fast.plan.phases import Planner

WEIGHTS = 1.3e9
REAL: dict[str, Any] = {"model": "opt-1.3b", "dtype": "bf16", "batch_size": 32, "steps": 4}
REAL |= {"prompt_length": 128, "response_length": 128}
TOY: dict[str, Any] = {"model": "toy", "dtype": "bf16", "batch_size": 2, "steps": 1}
TOY |= {"prompt_length": 6, "response_length": 5}
TOY_SHAPE = Shape(llama(32, 64, 2, 4, 2), llama(16, 32, 1, 2, 1), 128)
PASSES = 2 + 2 + 2 + 6 + 6  # of PPO's five models over a batch: scored, referred, valued, two trained
MAKING, PLANNING = 12.0, 12.0  # seconds: random weights, and the planner's fake passes; both assumed


def work(setting: Setting) -> Iterator[Work]:
    """Models made, written, read and written again; decoding bound by weights, passes by arithmetic."""
    given = setting.pick(REAL, TOY)
    weights, tokens = setting.pick(WEIGHTS, 1e5), given["prompt_length"] + given["response_length"]
    yield processes(2)
    yield Work(seconds=setting.pick(MAKING + PLANNING, 2.0))
    yield files(2 * 4 * weights + (4 + 3) * 4 * weights / 4 + (2 + 1) * 2 * weights)  # reads come from the page cache
    for passes in (PASSES, PASSES - 8):
        step = Work(bytes=given["response_length"] * 2 * weights, launches=given["response_length"] * 60)
        yield step.times(given["steps"])
        yield Work(flops=passes * weights * given["batch_size"] * tokens).times(given["steps"])
        yield Work(bytes=30 * weights).times(given["steps"])  # the optimizer's pass over masters and moments


def run(setting: Setting, found: Found) -> None:
    """A row per method, then a row per phase of each."""
    SHAPES.setdefault("toy", TOY_SHAPE)
    config = CompareConfig(
        output_dir=str(setting.scratch), methods=["ppo", "remax"], critics=["same"], **setting.pick(REAL, TOY)
    )
    command.run(config)
    for cell, row in zip(cells_of(config, prepare(config)), _rows(setting.scratch), strict=True):
        if not row["ran"]:
            found.fail(f"{row['name']}: {row['error']}")
            continue
        found.details[row["name"]] = row
        phases = ", ".join(f"{name} {seconds:.3f}" for name, seconds in row["phase_seconds"].items())
        found.row(f"{row['name']}, {config.model}: seconds of a step", f"{row['step_seconds']:.3f}", phases)
        stage = from_dict(load(METHODS[cell.method].config), cell.options | {"output_dir": "unused"}, cell.name)
        planned = Planner(plan_of(cell.method, stage)).phases(setting.device)
        for phase, peak in row["phase_peak_bytes"].items():
            if phase in planned:
                size = planned[phase].peak_bytes
                beside = f"planned {size / 2**30:.2f} GiB, {size / max(peak, 1):.3f} of the measured peak"
                found.row(f"{row['name']}: peak of {phase}", f"{peak / 2**30:.2f} GiB", beside)


def _rows(directory: Path) -> list[dict[str, Any]]:
    return read_json(directory / "compare.json")["methods"]
