"""The comparison's figures: time and memory as stacked bars, reward against time and against prompts."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlhf_fast.report.plots import MIB, PHASE_COLORS, ROLE_COLORS, STYLE, band
from rlhf_fast.report.styles import styles_of

_ACTIVATIONS = "#BBBBBB"
_DASHES = {"small critic": "--", "shared trunk": ":"}


def write_plots(directory: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Writes the figures that the rows have numbers for; returns their paths."""
    ran = [row for row in rows if row["ran"]]
    figures = {}
    with matplotlib.rc_context(STYLE):
        if ran:
            figures |= {"step_time": step_time(ran), "memory": memory(ran)}
        if any(row["reward"] for row in ran):
            figures |= {"reward": reward([row for row in ran if row["reward"]])}
        directory.mkdir(parents=True, exist_ok=True)
        paths = [directory / f"{name}.png" for name in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            figure.savefig(path, dpi=130)
    return paths


def step_time(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Median wall time of a step, stacked by phase; in seconds if any step takes a second or more, else in ms."""
    unit, scale = ("s", 1) if max(row["step_seconds"] for row in rows) >= 1 else ("ms", 1000)

    def parts(row: Mapping[str, Any]) -> dict[str, float]:
        phases = {phase: row["phase_seconds"].get(phase, 0.0) * scale for phase in PHASE_COLORS if phase != "other"}
        return phases | {"other": max(0.0, row["step_seconds"] * scale - sum(phases.values()))}

    return _stacked(rows, parts, PHASE_COLORS, f"median time of a step ({unit})", ".1f" if unit == "s" else ",.0f")


def memory(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Peak memory, stacked by role, activations on top."""

    def parts(row: Mapping[str, Any]) -> dict[str, float]:
        roles = {role: sum(kinds.values()) / MIB for role, kinds in row["static_bytes"].items()}
        return roles | {"activations": max(0.0, row["activation_bytes"] / MIB)}

    colors = ROLE_COLORS | {"activations": _ACTIVATIONS}
    return _stacked(rows, parts, colors, "peak memory above the process's own (MiB)")


def reward(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Held-out reward against training seconds and against prompts; bands are +- one standard error over prompts."""
    figure = Figure(figsize=(10.5, 4.8))
    styles = styles_of(row["name"].partition(", ")[0] for row in rows)
    for axes, key, label in zip(
        figure.subplots(1, 2, sharey=True),
        ("seconds", "prompts"),
        ("training time, evaluation not counted (s)", "prompts (pairs for DPO)"),
        strict=True,
    ):
        for row in rows:
            name, *variant = row["name"].split(", ")
            color, marker = styles[name]
            curve = row["reward"]["curve"]
            x, y, error = ([point[k] for point in curve] for k in (key, "reward", "reward_se"))
            style: dict[str, Any] = {"color": color, "linestyle": _DASHES.get(variant[0] if variant else "", "-")}
            if variant and variant[-1].startswith("LoRA"):
                style["alpha"] = 0.55
            axes.plot(x, y, marker=marker, markersize=4, linewidth=1.3, label=row["name"], **style)
            band(axes, x, y, error, color, 0.08)
        axes.set_xlabel(label)
    figure.axes[0].set_ylabel("reward on held-out prompts")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


def _stacked(
    rows: Sequence[Mapping[str, Any]],
    parts: Callable[[Mapping[str, Any]], Mapping[str, float]],
    colors: Mapping[str, str],
    label: str,
    number: str = ",.0f",
) -> Figure:
    figure = Figure(figsize=(7.2, 1.9 + 0.4 * len(rows)))
    axes: Axes = figure.subplots()
    shown: dict[str, None] = {}
    for i, row in enumerate(rows):
        left = 0.0
        for part, size in parts(row).items():
            if size:
                axes.barh(i, size, left=left, color=colors.get(part, "#AABBCC"), height=0.66)
                left, shown[part] = left + size, None
        axes.annotate(f"{left:{number}}", (left, i), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel(label)
    axes.margins(x=0.1)
    handles = [Patch(color=colors.get(part, "#AABBCC"), label=part.replace("_", " ")) for part in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)
    return figure
