"""The figures of a report: what each method bought in reward and KL, and what it cost in time and memory.

Each function takes finished runs and returns a matplotlib Figure; none of them touches global matplotlib state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from rlhf_fast.report.styles import styles_of

START_COLOR = "#333333"
# In the order in which a step runs them; other phases follow in grey-blue.
PHASE_COLORS = {
    "rollout": "#77AADD",
    "rescoring": "#8899CC",
    "scoring": "#99DDFF",
    "reference": "#44BB99",
    "value": "#BBCC33",
    "policy_update": "#EE8866",
    "value_update": "#EEDD88",
    "optimizer": "#FFAABB",
    "other": "#DDDDDD",
}
ROLE_COLORS = {"policy": "#332288", "value": "#117733", "reward": "#BB9922", "reference": "#AA4499"}
KINDS = ("weights", "gradients", "optimizer")
MIB = 2**20
STYLE: dict[Any, Any] = {  # for `matplotlib.rc_context`, whose stubs list the keys
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "axes.edgecolor": "#666666",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


@dataclass(frozen=True, kw_only=True)
class MethodRun:
    """One stage's run: the rows of its metrics.jsonl, the bytes its models hold, its completions after training.

    A row with "eval/reward" is an evaluation; it has eval/{reward,kl,length,entropy} with standard errors in
    "eval/..._se", and "time/total", the training seconds so far. Rows from step 1 on have time/<phase> and, where it
    was measured, memory/<phase>. samples: {"prompt", "completion", "reward"} per held-out prompt.
    record: run.json, of a run that has ended.
    """

    name: str
    history: list[dict[str, Any]]
    static_bytes: dict[str, dict[str, int]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.history:
            raise ValueError(f"history: expected rows of metrics in the run of {self.name}, got none")

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """The rows of the history that are evaluations; none where the run had no held-out prompts."""
        return [row for row in self.history if row.get("eval/reward") is not None]

    @property
    def final(self) -> dict[str, Any]:
        """The last evaluation."""
        return self.evaluations[-1]

    @property
    def seconds_per_step(self) -> dict[str, float]:
        """Mean seconds of each phase per training step, evaluation left out; "other" is what ran outside phases."""
        rows = [row for row in self.history if row["step"] > 0 and "time/step" in row]
        totals: dict[str, float] = {}
        for row in rows:
            phases = {k[5:]: v for k, v in row.items() if k.startswith("time/") and k[5:] not in _NOT_PHASES}
            rest = row["time/step"] - row.get("time/evaluation", 0.0) - sum(phases.values())
            for phase, seconds in {**phases, "other": max(0.0, rest)}.items():
                totals[phase] = totals.get(phase, 0.0) + seconds
        return {phase: totals[phase] / len(rows) for phase in in_order(totals, PHASE_COLORS)}

    @property
    def peak_bytes(self) -> dict[str, int]:
        """Largest measured memory of each phase over the run, evaluation left out."""
        peaks: dict[str, int] = {}
        for row in self.history:
            for key, value in row.items():
                if key.startswith("memory/") and key != "memory/evaluation":
                    peaks[key[7:]] = max(peaks.get(key[7:], 0), value)
        return {phase: peaks[phase] for phase in in_order(peaks, PHASE_COLORS)}


_NOT_PHASES = ("step", "total", "elapsed", "evaluation")


def make_plots(
    runs: Sequence[MethodRun],
    gradient_variance: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
    *,
    reward_name: str = "true reward",
) -> dict[str, Figure]:
    """Name -> figure. gradient_variance: where it was measured -> method -> {"variance", ...}."""
    evaluated = [run for run in runs if run.evaluations]
    figures: dict[str, Figure] = {}
    if evaluated:
        figures |= {"reward_kl": reward_kl(evaluated, reward_name), "reward_time": reward_time(evaluated, reward_name)}
    figures["step_time"] = step_time(runs)
    if any(run.static_bytes for run in runs):
        figures["static_memory"] = static_memory(runs)
    if any(run.peak_bytes for run in runs):
        figures["peak_memory"] = peak_memory(runs)
    if gradient_variance:
        figures["gradient_variance"] = variance(gradient_variance)
    return figures


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def styled(*args: Any) -> Figure:
        with matplotlib.rc_context(STYLE):
            return draw(*args)

    return styled


def band(
    axes: Axes, x: Sequence[float], mean: Sequence[float], error: Sequence[float], color: str, alpha: float = 0.15
) -> None:
    """mean +- error as a shade."""
    low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
    axes.fill_between(x, low, high, color=color, alpha=alpha, linewidth=0)


@_styled
def reward_kl(runs: Sequence[MethodRun], reward_name: str) -> Figure:
    """Held-out reward against KL to the start, a point per evaluation: up and to the left is better."""
    figure, axes = _figure(6.4, 4.8)
    styles = styles_of(run.name for run in runs)
    for run in runs:
        color, marker = styles[run.name]
        x, y = _series(run, "eval/kl"), _series(run, "eval/reward")
        axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.2, label=run.name)
        axes.errorbar(
            x[-1:],
            y[-1:],
            xerr=[run.final.get("eval/kl_se", 0.0)],
            yerr=[run.final.get("eval/reward_se", 0.0)],
            color=color,
            marker=marker,
            markersize=9,
            markeredgecolor="white",
            capsize=3,
            zorder=4,
        )
    _mark_start(axes, runs, "eval/kl")
    axes.set_xlabel("KL to the start (nats per completion)")
    axes.set_ylabel(f"{reward_name} on held-out prompts")
    _legend(axes, 3)
    return figure


@_styled
def reward_time(runs: Sequence[MethodRun], reward_name: str) -> Figure:
    """Held-out reward against training seconds; bands are +- one standard error over prompts."""
    figure, axes = _figure(6.4, 4.8)
    styles = styles_of(run.name for run in runs)
    for run in runs:
        color, marker = styles[run.name]
        x, y, error = (_series(run, key) for key in ("time/total", "eval/reward", "eval/reward_se"))
        axes.plot(x, y, color=color, marker=marker, markersize=4, linewidth=1.2, label=run.name)
        band(axes, x, y, error, color, 0.12)
    _mark_start(axes, runs, "time/total")
    axes.set_xlabel("training time, evaluation not counted (s)")
    axes.set_ylabel(f"{reward_name} on held-out prompts")
    _legend(axes, 3)
    return figure


@_styled
def step_time(runs: Sequence[MethodRun]) -> Figure:
    """Mean wall time of a step, stacked by phase."""
    phases = in_order({phase: 0 for run in runs for phase in run.seconds_per_step}, PHASE_COLORS)
    figure, axes = _figure(6.4, 1.9 + 0.42 * len(runs))
    for i, run in enumerate(runs):
        left = 0.0
        for phase, seconds in run.seconds_per_step.items():
            if not seconds:
                continue
            axes.barh(i, seconds * 1e3, left=left * 1e3, color=PHASE_COLORS.get(phase, "#AABBCC"), height=0.66)
            left += seconds
        axes.annotate(f"{left * 1e3:,.0f}", (left * 1e3, i), (4, 0), textcoords="offset points", va="center")
    _bar_axes(axes, runs, "time per step (ms)")
    handles = [Patch(color=PHASE_COLORS.get(phase, "#AABBCC"), label=phase.replace("_", " ")) for phase in phases]
    _legend(axes, 4, handles)
    return figure


@_styled
def static_memory(runs: Sequence[MethodRun]) -> Figure:
    """What the models hold: bytes by role, the shade telling weights, gradients and optimizer state."""
    roles = in_order({role: 0 for run in runs for role in run.static_bytes}, ROLE_COLORS)
    figure, axes = _figure(6.4, 2.3 + 0.42 * len(runs))
    for i, run in enumerate(runs):
        left = 0.0
        for role in in_order(run.static_bytes, ROLE_COLORS):
            for kind in KINDS:
                mib = run.static_bytes[role].get(kind, 0) / MIB
                if not mib:
                    continue  # a bar of no width would pin the axis to its place
                axes.barh(i, mib, left=left, color=_shade(role, kind), height=0.66, edgecolor="white", linewidth=0.6)
                left += mib
        axes.annotate(f"{left:,.1f}", (left, i), (4, 0), textcoords="offset points", va="center")
    _bar_axes(axes, runs, "memory held by models (MiB)")
    handles = [Patch(color=_shade(role, "weights"), label=role) for role in roles]
    handles += [Patch(color=_tint("#555555", kind), label=kind) for kind in KINDS]
    _legend(axes, 4, handles)
    return figure


@_styled
def peak_memory(runs: Sequence[MethodRun]) -> Figure:
    """Peak memory of each phase; a dot per method, side by side where they coincide."""
    phases = in_order({phase: 0 for run in runs for phase in run.peak_bytes}, PHASE_COLORS)
    figure, axes = _figure(6.4, 1.7 + 0.5 * len(phases))
    styles = styles_of(run.name for run in runs)
    for i, run in enumerate(runs):
        color, marker = styles[run.name]
        shift = 0.6 * ((i + 0.5) / len(runs) - 0.5)
        y = [phases.index(phase) + shift for phase in run.peak_bytes]
        x = [peak / MIB for peak in run.peak_bytes.values()]
        axes.plot(x, y, color=color, marker=marker, linestyle="", label=run.name)
    axes.set_yticks(range(len(phases)), [phase.replace("_", " ") for phase in phases])
    for boundary in range(1, len(phases)):
        axes.axhline(boundary - 0.5, color="#E6E6E6", linewidth=0.8)
    axes.set_ylim(len(phases) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("peak memory in the phase (MiB)")
    _legend(axes, 3)
    return figure


@_styled
def variance(measured: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure:
    """Total variance of the policy gradient by method, at each policy where it was measured."""
    figure, axes = _figure(6.4, 3.4)
    methods = list(dict.fromkeys(method for at in measured.values() for method in at))
    styles, width = styles_of(methods), 0.7 / len(methods)
    for i, method in enumerate(methods):
        x = [j + (i - (len(methods) - 1) / 2) * width for j in range(len(measured))]
        heights = [at[method]["variance"] for at in measured.values()]
        bars = axes.bar(x, heights, width * 0.94, color=styles[method].color, label=method)
        axes.bar_label(bars, [f"{height:.3g}" for height in heights], padding=2)
    axes.set_xticks(range(len(measured)), [where.replace(" ", "\n", 1) for where in measured])
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("variance of the gradient (trace)")
    _legend(axes, len(methods))
    return figure


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    return figure, figure.add_subplot()


def _series(run: MethodRun, key: str) -> list[float]:
    return [row.get(key, 0.0) for row in run.evaluations]


def _mark_start(axes: Axes, runs: Sequence[MethodRun], x_key: str) -> None:
    first = runs[0].evaluations[0]
    axes.plot(
        first.get(x_key, 0.0),
        first["eval/reward"],
        color=START_COLOR,
        marker="*",
        markersize=15,
        markeredgecolor="white",
        linestyle="",
        zorder=5,
        label="start",
    )


def _bar_axes(axes: Axes, runs: Sequence[MethodRun], label: str) -> None:
    axes.set_yticks(range(len(runs)), [run.name for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(label)
    axes.margins(x=0.12)


def _legend(axes: Axes, columns: int, handles: list[Patch] | None = None) -> None:
    """Above the axes, where it covers no data."""
    options = {"handles": handles} if handles else {}
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=columns, borderaxespad=0, handlelength=1.2, **options)


def _shade(role: str, kind: str) -> tuple[float, float, float]:
    return _tint(ROLE_COLORS.get(role, "#56B4E9"), kind)


def _tint(color: str, kind: str) -> tuple[float, float, float]:
    strength = {"weights": 1.0, "gradients": 0.6, "optimizer": 0.3}[kind]
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(color))
    return red, green, blue


def in_order(names: Mapping[str, Any], order: Mapping[str, Any]) -> list[str]:
    """`names` in the order of `order`, unknown ones before "other"."""
    known = list(order)
    place = {name: i for i, name in enumerate(known)}
    return sorted(names, key=lambda name: (name == "other", place.get(name, len(known))))
