"""What the comparison says: what was equal, which bars were met, rows for people, Markdown."""

from collections.abc import Sequence
from typing import Any

from bench.record import opening
from bench.trainers.compare import OURS, TOLERANCE
from rlhf_fast.training.metrics import markdown_table


def rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per case and contender; "ours is faster" is the median over the rounds of that round's ratio."""
    table = []
    for result in results:
        for name, seconds in result["seconds_per_step"].items():
            row = {"trainer": _trainer(result), "by": name, "steps/s": 1 / seconds["median"]}
            row |= {f"{quantile} seconds": seconds[quantile] for quantile in ("median", "p20", "p80")}
            row["CPU time seconds"] = result["cpu_seconds_per_step"][name]["median"]
            row["peak bytes"] = result["peak_bytes"][name]
            if name != OURS:
                row["ours is faster"] = f"{result['speedup_seconds']['median']:.3g}x"
                row["by CPU time"] = f"{result['speedup_cpu_seconds']['median']:.3g}x"
            table.append(row)
    return table


def equality_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per number of the first step. Two bf16 runs round differently, so that their numbers have no bar."""
    return [
        {"trainer": _trainer(r), **equality, **({} if r["dtype"] == "fp32" else {"met": "no bar"})}
        for r in results
        for equality in r.get("equalities", ())
    ]


def bar_rows(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Speed, memory and equality of every case; NO for all of them where the rival was absent."""
    table = []
    for result in results:
        first = {"trainer": _trainer(result), "against": result["rival"]}
        limits = {
            "steps/s": f">= {result['bar']:g}x",
            "peak memory": "<= 1x",
            "first step": f"equal within {TOLERANCE:g}",
        }
        if result["dtype"] != "fp32":
            del limits["first step"]
        if result["absent"]:
            table += [
                {**first, "what": what, "bar": bar, "measured": result["absent"], "p20": "", "p80": "", "met": "NO"}
                for what, bar in limits.items()
            ]
            continue
        speedup = result["speedup_seconds"]
        memory = result["peak_bytes"][OURS] / result["peak_bytes"][result["rival"]]
        worst = max(equality["relative difference"] for equality in result["equalities"])
        measured = {
            "steps/s": (f"{speedup['median']:.3g}x", speedup["median"] >= result["bar"]),
            "peak memory": (f"{memory:.3g}x", memory <= 1),
            "first step": (f"{worst:.2g}", all(equality["met"] == "yes" for equality in result["equalities"])),
        }
        for what in limits:
            value, met = measured[what]
            spread = {q: f"{speedup[q]:.3g}x" if what == "steps/s" else "" for q in ("p20", "p80")}
            row = {**first, "what": what, "bar": limits[what], "measured": value}
            table.append({**row, **spread, "met": "yes" if met else "NO"})
    return table


def markdown(run: dict[str, Any]) -> str:
    """The whole result as one page of Markdown."""
    environments = [
        f"{name}: {', '.join(f'{key} {value}' for key, value in environment.items())}"
        for name, environment in _environments(run["cases"]).items()
    ]
    parts = [
        *opening("Trainers", run),
        "; ".join(environments) + ".",
        f"All contenders train {run['start']}, with the same weights, batches, "
        "optimizer and lengths. Each contender has a process of its own. The contenders take turns of some steps in "
        "rounds, and the warm-up is left out. Speeds are the medians of the rounds' ratios. Peak memory is that of "
        "the process, imports included. `bench/trainers/cases.py` has the settings and the differences.",
        "## Bars",
        markdown_table(run["bars"]),
        "## Time and memory",
        markdown_table(rows(run["cases"])),
        "## The first step",
        "Differences are relative to the rival's number. A gradient is one vector of all weights, and its difference "
        "is relative to its norm. Two bf16 runs round differently, so that their numbers have no bar.",
        markdown_table(run["equalities"]),
    ]
    return "\n\n".join(parts) + "\n"


def _trainer(result: dict[str, Any]) -> str:
    return result["trainer"] + ("" if result["dtype"] == "fp32" else f", {result['dtype']}")


def _environments(results: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: environment for result in results for name, environment in result["environments"].items()}
