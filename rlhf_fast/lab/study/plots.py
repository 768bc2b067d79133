"""The figures of the studies of trained models; one colour per method everywhere, bands and bars are +- one error."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rlhf_fast.lab.study.judge import ROWS, SFT
from rlhf_fast.report.plots import STYLE, band
from rlhf_fast.report.styles import STYLES, Style, styles_of

STUDY_STYLES = STYLES | {
    "PPO-GT": Style("#56B4E9", "."),
    "Unlikelihood": Style("#999999", "."),
    "Preferred-FT": Style("#44AA99", "."),
    "Best-of-N": Style("#332288", "."),
    "Best-of-16": Style("#332288", "."),
    "SFT": Style("#333333", "."),
    "PPO+": Style("#6699CC", "."),
    "ReMax+": Style("#E89C6B", "."),
}
DASHED = ("PPO-GT", "Best-of-N", "Best-of-16", "SFT")


def save(path: Path, figure_of: Callable[[dict[str, Any]], Figure], record: dict[str, Any]) -> None:
    """Writes the figure of what a study's JSON holds."""
    with matplotlib.rc_context(STYLE):
        figure_of(record).savefig(path, dpi=110)


def frontier_figure(record: dict[str, Any]) -> Figure:
    """Left every point of every run, right the envelopes' means over seeds."""
    figure = Figure(figsize=(12, 5.6))
    left, right = figure.subplots(1, 2, sharey=True)
    kl, styles = record["kl"], styles_of(record["methods"], STUDY_STYLES)
    for name, method in record["methods"].items():
        cloud = [point for run in record["runs"] if run["method"] == name for point in run["points"]]
        _, kls, rewards = zip(*(point for point in cloud if point[1] <= kl[-1]), strict=True)
        left.plot(kls, rewards, styles[name].marker, markersize=3, color=styles[name].color, alpha=0.6)
        _band(right, name, styles[name].color, kl, method["envelope"]["mean"], method["envelope"]["se"])
    for axes, title in ((left, "policies during training, all seeds"), (right, "upper envelopes, mean over seeds")):
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("KL to the SFT model, nats per completion")
        axes.set_xlim(0, kl[-1])
    left.set_ylabel(f"{record['reward_name']} on held-out prompts")
    lines, names = right.get_legend_handles_labels()
    handles = [
        Line2D([], [], color=styles[name].color, linestyle=line.get_linestyle(), marker=styles[name].marker)
        for line, name in zip(lines, names, strict=True)
    ]
    figure.legend(handles, names, loc="outside lower center", ncols=5)
    return figure


def winrate_figure(record: dict[str, Any]) -> Figure:
    """Share of prompts won by the row's method over the column's."""
    methods = record["methods"]
    shares = [[0.5 if a == b else record["win_rate"][a][b]["mean"] for b in methods] for a in methods]
    figure = Figure(figsize=(1.4 + 0.75 * len(methods), 1.2 + 0.62 * len(methods)))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="RdBu", vmin=0, vmax=1)
    axes.set_xticks(range(len(methods)), methods, rotation=45, ha="right")
    axes.set_yticks(range(len(methods)), methods)
    axes.grid(visible=False)
    for i, row in enumerate(shares):
        for j, share in enumerate(row):
            if i != j:
                percent = round(100 * share)
                color = "white" if abs(percent - 50) > 30 else "black"
                axes.text(j, i, f"{percent}", ha="center", va="center", color=color, fontsize=10)
    axes.set_title("prompts won by the row over the column, %", fontsize=11)
    return figure


def temperature_figure(record: dict[str, Any]) -> Figure:
    """Win rate against the rows' completions over temperature."""
    figure = Figure(figsize=(7.6, 4.6))
    axes = figure.add_subplot()
    styles = styles_of(record["methods"], STUDY_STYLES)
    for name, rates in record["methods"].items():
        _band(axes, name, styles[name].color, [float(t) for t in rates], *_columns(list(rates.values())), marker="o")
    axes.axhline(0.5, color="#BBBBBB", linewidth=1, zorder=0)
    axes.set_xlabel("sampling temperature")
    axes.set_ylabel("win rate against the rows' completions")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center")
    return figure


def convergence_figure(record: dict[str, Any]) -> Figure:
    """Win rate against the rows' completions over the share of the run, and over training seconds."""
    figure = Figure(figsize=(12, 4.8))
    left, right = figure.subplots(1, 2, sharey=True)
    styles = styles_of(record["methods"], STUDY_STYLES)
    for name, curve in record["methods"].items():
        color = styles[name].color
        means, errors = _columns(curve["win_rate"])
        _band(left, name, color, [step / curve["step"][-1] for step in curve["step"]], means, errors, marker="o")
        _band(right, name, color, [second["mean"] for second in curve["seconds"]], means, errors, marker="o")
    for axes, label in ((left, "share of the run's steps"), (right, "training seconds")):
        axes.axhline(0.5, color="#BBBBBB", linewidth=1, zorder=0)
        axes.set_xlabel(label)
    left.set_ylabel("win rate against the rows' completions")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=8)
    return figure


def shift_figure(record: dict[str, Any]) -> Figure:
    """Gain in true reward over the SFT model, on the training's domain and on another."""
    own, shifted = (record["domains"][name] for name in ("own", "shifted"))
    methods = sorted(own.keys() - {SFT, ROWS}, key=lambda name: -own[name]["gain_over_sft"]["mean"])
    styles = styles_of(methods, STUDY_STYLES)
    figure = Figure(figsize=(1.5 + 0.95 * len(methods), 4.4))
    axes = figure.add_subplot()
    for place, domain, alpha in ((-0.2, own, 1.0), (0.2, shifted, 0.45)):
        for i, method in enumerate(methods):
            gain = domain[method]["gain_over_sft"]
            style = {"color": styles[method].color, "alpha": alpha, "width": 0.38, "capsize": 3}
            axes.bar(i + place, gain["mean"], yerr=gain["se"], **style)
    axes.set_xticks(range(len(methods)), methods, rotation=30, ha="right")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel(f"{record['reward_name']}, gain over the SFT model")
    axes.set_title("dark: the training prompts' domain, light: another", fontsize=11)
    return figure


def _columns(values: list[dict[str, float]]) -> tuple[list[float], list[float]]:
    return [value["mean"] for value in values], [value["se"] for value in values]


def _band(
    axes: Axes, name: str, color: str, x: list[float], means: list[float], errors: list[float], marker: str = ""
) -> None:
    style = {"color": color, "linestyle": "--" if name in DASHED else "-", "linewidth": 1.4}
    axes.plot(x, means, label=name, marker=marker, markersize=4, **style)
    band(axes, x, means, errors, color)
