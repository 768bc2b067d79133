"""Rows for people, bars and Markdown of `python -m bench steps`."""

from typing import Any

from bench.steps import trace
from bench.steps.floor import BYTES_PER_WEIGHT
from rlhf_fast.training.metrics import markdown_table

TITLES = {"sft": "SFT", "dpo": "DPO", "ppo": "PPO", "remax": "ReMax", "prefill": "prefill", "decode": "decode step"}
BARS = {"prefill": 1.2, "decode": 1.4}  # of the floor's time
TRAINING_BAR = 1.35
RIVALS = "[bench trainers](cpu_trainers_smollm2.md) has TRL's CPU time for SFT, DPO, RLOO and PPO."


def ratio(result: dict[str, Any]) -> float:
    """A step's time by that of its bare matmuls."""
    return result["seconds"]["median"] / result["floor"]["seconds"]


def step_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step."""
    return [
        {
            "step": _name(result),
            **{f"{name} seconds": result["seconds"][name] for name in ("median", "p20", "p80")},
            "CPU seconds": result["cpu_seconds"]["median"],
            "CPU, one thread seconds": result["one_thread_cpu_seconds"],
            "floor seconds": result["floor"]["seconds"],
            "of the floor": f"{ratio(result):.2f}x",
            "by CPU time": f"{result['cpu_seconds']['median'] / result['floor']['cpu_seconds']:.2f}x",
        }
        for result in results
    ]


def bar_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each step's bar."""
    table = []
    for result in results:
        most, measured = BARS.get(result["step"], TRAINING_BAR), ratio(result)
        met = "yes" if measured <= most else "NO"
        table.append({"step": _name(result), "bar": f"<= {most:g}x", "measured": f"{measured:.2f}x", "met": met})
    return table


def share_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each group's share of the profiled step; they add up to 100 %. Then what the threads waited, and the overhead."""
    table = []
    for result in results:
        profile = result["profile"]
        shares = {group: _share(profile["groups"][group] / profile["seconds"]) for group in trace.GROUPS}
        waiting = profile["waiting"] / (profile["waiting"] + profile["cpu_seconds"])
        slower = f"{profile['seconds'] / result['seconds']['median']:.2f}x"
        table.append({"step": _name(result), **shares, "waiting": _share(waiting), "under the profiler": slower})
    return table


def floor_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups with matmuls beside their bare matmuls."""
    table = []
    for result in results:
        row: dict[str, Any] = {"step": _name(result)}
        for group, alone in result["floor"]["groups"].items():
            if alone:
                row[f"{group} seconds"] = result["profile"]["groups"][group]
                row[f"{group}: alone seconds"] = alone
        table.append(row)
    columns = list(dict.fromkeys(column for row in table for column in row))
    return [{column: row.get(column, "") for column in columns} for row in table]


def optimizer_rows(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """AdamW's pass over the weights beside the memory's speed."""
    table = []
    for result in results:
        if optimizer := result.get("optimizer"):
            speed = BYTES_PER_WEIGHT * optimizer["weights"] / optimizer["seconds"]
            row = {"step": _name(result), "AdamW seconds": optimizer["seconds"], "GB/s": f"{speed / 1e9:.1f}"}
            triad = result["triad"]
            table.append(row | {"triad, GB/s": f"{triad / 1e9:.1f}", "of the triad": _share(speed / triad)})
    return table


def tables(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Title -> rows."""
    results = record["results"]
    return {
        "Steps beside their bare matmuls": step_rows(results),
        "Bars": record["bars"],
        "Where the time of a step goes": share_rows(results),
        "Groups beside their bare matmuls, in the profiled step": floor_rows(results),
        "The optimizer beside memory": optimizer_rows(results),
    }


def markdown(record: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    machine = ", ".join(f"{key} {value}" for key, value in record["machine"].items())
    parts = [
        "# Whole steps",
        f"`{record['command']}`, {record['date']}: {machine}.",
        "The floor of a step is the sum of its matmuls' times, each timed alone on as many threads, times how often "
        "the step runs it. Attention's matmuls count in the floor: two forward, five backward for each row and head, "
        "and of a causal square the half that is seen. A step of PPO and ReMax is a round, rollout and scoring "
        "included. The groups of a profiled step add up to its time. `waiting` is the part of threads x time in which "
        "a thread had no work. `by CPU time` compares the CPU time of both, which other processes disturb less.",
        *([RIVALS] if record["checkpoint"] else []),
    ]
    for title, table in tables(record).items():
        if table:
            parts += [f"## {title}", markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _name(result: dict[str, Any]) -> str:
    return f"{result['model']}, {TITLES[result['step']]}, {result['dtype']}"


def _share(part: float) -> str:
    return f"{part:.1%}"
