"""What the compared runs left on disk, as numbers: time by phase, memory by phase and role, reward by time and prompt.

The first steps of a run (allocations, first calls) are left out of times. Activation bytes are a peak less what the
process held before any model was loaded and less the static bytes of the roles: gradients and optimizer states count
as static from the first step on, so a phase before them shows less.
"""

import statistics
from pathlib import Path
from typing import Any

from rlhf_fast.data.damage import read_json
from rlhf_fast.lab.compare.cells import Cell
from rlhf_fast.methods import METHODS
from rlhf_fast.training.metrics import read_metrics

WARM_UP = 2  # steps
_BACKWARD = ("policy_update", "value_update", "optimizer")


def figures_of(cell: Cell, directory: Path) -> dict[str, Any]:
    """Numbers of one run; a run that did not fit has its error only."""
    result = read_json(directory / "result.json")
    about = {"name": cell.name, "key": cell.key, "method": cell.method, "seed": cell.seed}
    if not result["ran"]:
        return about | {"ran": False, "error": result["error"]}
    run = read_json(directory / "run.json")
    history = read_metrics(directory / "metrics.jsonl")
    steps = [row for row in history if row["step"] > 0]
    timed = steps[WARM_UP:] or steps
    phases = sorted(
        {key[5:] for row in timed for key in row if key.startswith("time/")} - {"step", "total", "evaluation"}
    )
    seconds = {phase: statistics.median(row.get(f"time/{phase}", 0.0) for row in timed) for phase in phases}
    step = statistics.median(row["time/step"] - row.get("time/evaluation", 0.0) for row in timed)
    peaks: dict[str, int] = {}
    for row in steps:
        for key, value in row.items():
            if key.startswith("memory/") and key != "memory/evaluation":
                peaks[key[7:]] = max(peaks.get(key[7:], 0), int(value) - result["baseline_bytes"])
    static = sum(sum(role.values()) for role in run["static_bytes"].values())
    completions = run["config"]["batch_size"] * METHODS[cell.method].sequences
    return about | {
        "ran": True,
        "step_seconds": step,
        "phase_seconds": seconds,
        "samples_per_second": completions / step,
        "peak_bytes": max(peaks.values()),
        "phase_peak_bytes": peaks,
        "static_bytes": run["static_bytes"],
        "activation_bytes": max(peaks.values()) - static,
        "parameters": run["parameters"],
        "reward": _reward(history, _prompts_per_step(cell.method, run["config"])),
        "environment": run["environment"],
    }


def _prompts_per_step(method: str, config: dict[str, Any]) -> int:
    """Prompts of a step, or pairs of an offline method."""
    return config["batch_size"] // METHODS[method].samples_of(config.get("group_size", 1))


def _reward(history: list[dict[str, Any]], prompts_per_step: int) -> dict[str, Any] | None:
    """Held-out reward over the run, where it was evaluated."""
    points = [row for row in history if "eval/reward" in row]
    if not points:
        return None
    first, last = points[0], points[-1]
    gain, prompts = last["eval/reward"] - first["eval/reward"], last["step"] * prompts_per_step
    return {
        "curve": [
            {
                "seconds": row["time/total"],
                "prompts": row["step"] * prompts_per_step,
                "reward": row["eval/reward"],
                "reward_se": row["eval/reward_se"],
                "kl": row["eval/kl"],
            }
            for row in points
        ],
        "gain": gain,
        "gain_per_minute": gain / (last["time/total"] / 60),
        "gain_per_1000_prompts": gain / prompts * 1000,
    }


def time_model(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds of a step that the methods' counts of generations and backward passes predict, beside the measured ones.

    PPO = t_gen + 2 t_back; ReMax = 2 t_gen + t_back with two decodes, (1 + f) t_gen + t_back with its greedy rows
    folded into the one (ReMax paper, app. E; f measured here). t_gen, t_back and the passes both share (scoring,
    reference) are REINFORCE's: one decode, one backward pass. Empty without REINFORCE.
    """
    by_name = {r["name"]: r for r in results if r["ran"]}
    rows = []
    for suffix in sorted({r["name"].partition(", LoRA")[2] for r in by_name.values()}):
        tail = f", LoRA{suffix}" if suffix else ""
        base, remax = by_name.get(f"REINFORCE{tail}"), by_name.get(f"ReMax{tail}")
        if base is None:
            continue
        generation, backward = base["phase_seconds"]["rollout"], _backward(base)
        shared = base["step_seconds"] - generation - backward
        predicted = {f"PPO{tail}": ("t_gen + 2 t_back", generation + 2 * backward)}
        if remax is not None:
            fold = remax["phase_seconds"]["rollout"] / generation - 1
            predicted[f"ReMax{tail}"] = (f"(1 + {fold:.2f}) t_gen + t_back", (1 + fold) * generation + backward)
            predicted[f"ReMax{tail}, two decodes"] = ("2 t_gen + t_back", 2 * generation + backward)
        for name, (formula, seconds) in predicted.items():
            rows.append(
                {
                    "method": name,
                    "model": formula,
                    "t_gen seconds": generation,
                    "t_back seconds": backward,
                    "predicted seconds": seconds + shared,
                    "measured seconds": by_name[name]["step_seconds"] if name in by_name else None,
                }
            )
    return rows


def _backward(result: dict[str, Any]) -> float:
    return sum(result["phase_seconds"].get(phase, 0.0) for phase in _BACKWARD)


def median_over_seeds(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per name: numbers as medians over its seeds, curves of the first."""
    rows = []
    for name in dict.fromkeys(r["name"] for r in results):
        group = [r for r in results if r["name"] == name]
        ran = [r for r in group if r["ran"]]
        rows.append(_median(ran) if len(ran) > 1 else (ran or group)[0])
    return rows


def _median(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, dict):
        return {key: _median([v[key] for v in values]) for key in first if all(key in v for v in values)}
    if isinstance(first, bool | str | list | None):
        return first
    return statistics.median(values)
