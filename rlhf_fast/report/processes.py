"""What every process of a run held, as tables of a report: model memory by role, and the peak of every phase."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlhf_fast.report.plots import PHASE_COLORS, ROLE_COLORS, MethodRun, in_order


def held(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """A row per process: its parts of the weights, gradients and optimizer states of each role."""
    return _table(runs, ROLE_COLORS, lambda process: {r: sum(p.values()) for r, p in process["static_bytes"].items()})


def peaks(runs: Sequence[MethodRun]) -> list[dict[str, Any]]:
    """A row per process: its peak in each phase."""

    def of(process: Mapping[str, Any]) -> dict[str, int]:
        phases = process["phases"]
        return {name: phase["peak_bytes"] for name, phase in phases.items() if isinstance(phase, Mapping)}

    return _table(runs, PHASE_COLORS, of)


def _table(
    runs: Sequence[MethodRun], order: Mapping[str, Any], bytes_of: Callable[[Mapping[str, Any]], dict[str, int]]
) -> list[dict[str, Any]]:
    """The rows of all runs in several processes; processes with equal bytes, one after the other, share a row."""
    found = [
        (run.name, rank, bytes_of(process))
        for run in runs
        for rank, process in enumerate(run.record.get("processes", ()))
    ]
    names = in_order({name: 0 for *_, sizes in found for name in sizes}, order)
    rows: list[dict[str, Any]] = []
    for method, rank, sizes in found:
        row = {"method": method} | {f"{name.replace('_', ' ')} bytes": sizes.get(name) for name in names}
        if rows and row.items() <= rows[-1].items():
            rows[-1]["process"] = f"{rows[-1]['process'].partition('-')[0]}-{rank}"
        else:
            rows.append({"method": method, "process": str(rank)} | row)
    return rows
