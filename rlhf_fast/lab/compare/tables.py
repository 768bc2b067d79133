"""The comparison for people: tables on the console and in Markdown."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_fast.training.metrics import markdown_table, print_table

PHASES = ("rollout", "scoring", "reference", "value", "policy_update", "value_update", "optimizer")
_TITLES = {
    "time": "Time of a step by phase",
    "memory": "Memory: peak above the process's own, static by role, activations",
    "peaks": "Peak of each phase",
    "model": "The time model beside what was measured",
    "reward": "Reward on held-out prompts",
}
_NOTES = {
    "model": "t_gen is one decode. t_back is one forward and backward pass with its optimizer step. Both are "
    "REINFORCE's. ReMax is faster than PPO where t_gen < t_back or, with its greedy rows folded into one decode, where "
    "f t_gen < t_back.",
    "memory": "Static: weights, gradients and optimizer states; models that share weights count them once.",
}


def tables(record: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Name -> rows, without the tables that have no row."""
    ran = [row for row in record["methods"] if row["ran"]]
    failed = [row for row in record["methods"] if not row["ran"]]
    time = [
        {"method": row["name"], "step seconds": row["step_seconds"], "samples/s": row["samples_per_second"]}
        | {f"{p.replace('_', ' ')} seconds": row["phase_seconds"][p] for p in PHASES if p in row["phase_seconds"]}
        for row in ran
    ]
    memory = [
        {"method": row["name"], "peak bytes": row["peak_bytes"]}
        | {f"{role} bytes": sum(kinds.values()) for role, kinds in row["static_bytes"].items()}
        | {"activation bytes": row["activation_bytes"]}
        | ({"largest batch": row["largest_batch"]} if "largest_batch" in row else {})
        for row in ran
    ]
    memory += [{"method": row["name"], "peak bytes": "does not fit"} for row in failed]
    peaks = [
        {"method": row["name"]}
        | {f"{p.replace('_', ' ')} bytes": row["phase_peak_bytes"][p] for p in PHASES if p in row["phase_peak_bytes"]}
        for row in ran
    ]
    reward = [
        {
            "method": row["name"],
            "start": row["reward"]["curve"][0]["reward"],
            "end": (row["reward"]["curve"][-1]["reward"], row["reward"]["curve"][-1]["reward_se"]),
            "KL, nats": row["reward"]["curve"][-1]["kl"],
            "gain a minute": row["reward"]["gain_per_minute"],
            "gain per 1,000 prompts": row["reward"]["gain_per_1000_prompts"],
        }
        for row in ran
        if row["reward"]
    ]
    every = {"time": time, "memory": memory, "peaks": peaks, "model": record["time_model"], "reward": reward}
    return {name: rows for name, rows in every.items() if rows}


def show(record: Mapping[str, Any]) -> None:
    """Print every table, with its note."""
    for name, rows in tables(record).items():
        print_table(_TITLES[name], rows)
        if name in _NOTES:
            print(_NOTES[name])


def markdown(record: Mapping[str, Any], plots: Sequence[Path]) -> str:
    """The tables and the plots as one page of Markdown."""
    config, machine = record["config"], record["environment"] or {}
    sizes = {row["parameters"]["policy"] for row in record["methods"] if row["ran"]}
    weights = f", {max(sizes) / 1e6:,.1f}M weights" if sizes else ""
    parts = [
        f"# {config['model']}{weights}: methods side by side",
        f"`{record['command']}`, {record['date']}: " + ", ".join(f"{k} {v}" for k, v in machine.items()) + ".",
        f"{config['batch_size']} completions a step, {config['steps']} steps, medians over steps"
        + (f" and {len(config['seeds'])} seeds" if len(config["seeds"]) > 1 else ", one seed")
        + "; every run in a process of its own.",
    ]
    for name, rows in tables(record).items():
        parts += [f"## {_TITLES[name]}", markdown_table(rows)] + ([_NOTES[name]] if name in _NOTES else [])
    parts += [f"![{path.stem.replace('_', ' ')}](plots/{path.name})" for path in plots]
    return "\n\n".join(parts) + "\n"
