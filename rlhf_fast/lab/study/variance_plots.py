"""The figures of `rlhf-fast study variance`: norms and variances over training, and the two-armed bandit."""

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from rlhf_fast.report.plots import band
from rlhf_fast.report.styles import STYLES, Style, styles_of

_STYLES = STYLES | {"batch mean": Style("#999999", "o"), "value model": STYLES["PPO"]}
_STYLES |= {"RLOO, k = 2": Style("#88CCAA", "o"), "RLOO, k = 3": Style("#44B58C", "o"), "RLOO, k = 4": STYLES["RLOO"]}
TITLES = {
    "plain": "scores as they are",
    "constant": "scores with one offset for all",
    "by prompt": "scores with one offset per prompt's last token",
}
_ROWS = {"norm": "norm of a gradient", "variance": "total variance of a gradient"}


def training_figure(record: dict[str, Any]) -> Figure:
    """Of the record that variance.json holds: a column for each kind of score; bands are +- one standard error."""
    figure = Figure(figsize=(14, 7.5))
    grid = figure.subplots(2, len(record["panels"]), sharex=True, sharey="row")
    styles = styles_of((name for methods in record["panels"].values() for name in methods), _STYLES)
    for column, (panel, methods) in enumerate(record["panels"].items()):
        grid[0, column].set_title(TITLES[panel], fontsize=11)
        grid[1, column].set_xlabel("rounds of ReMax")
        for (key, label), axes in zip(_ROWS.items(), grid[:, column], strict=True):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(2, 0.4)))
            for name, measured in methods.items():
                mean, error = measured[key]["mean"], measured[key]["se"]
                line = {"color": styles[name].color, "linewidth": 1.6}
                axes.plot(record["rounds"], mean, "o-", markersize=3, label=name, **line)
                band(axes, record["rounds"], mean, error, styles[name].color)
            if column == 0:
                axes.set_ylabel(label)
        equal = methods["ReMax"]["variance at equal decoding"]["mean"]
        label = "ReMax at equal decoding (greedy rows counted)"
        grid[1, column].plot(record["rounds"], equal, "--", color=styles["ReMax"].color, linewidth=1.2, label=label)
    figure.legend(*grid[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure


def bandit_figure(record: dict[str, Any]) -> Figure:
    """A column for each pair of rewards; where the greedy baseline raises the variance the background is shaded."""
    cases, figure = record["two_armed"], Figure(figsize=(14, 4.6))
    styles = styles_of((name for case in cases for name in case["variance"]), _STYLES)
    for axes, case in zip(figure.subplots(1, len(cases)), cases, strict=True):
        for name, curve in case["variance"].items():
            dashed = "--" if name.startswith("RLOO") else "-"
            axes.plot(case["p"], curve, dashed, color=styles[name].color, linewidth=1.6, label=name)
        if case["crossover"] < 1:
            axes.axvspan(case["crossover"], 1, color="#F3E3DC", zorder=0)
            axes.text(0.99, 0.97, "greedy baseline\nraises it", fontsize=8, ha="right", va="top",
                      transform=axes.get_xaxis_transform())  # fmt: skip
        crossover = f"crossover at p = {case['crossover']:.3g}" if case["crossover"] < 1 else "no crossover"
        axes.set_title(f"rewards {case['r1']:g} and {case['r2']:g}: {crossover}", fontsize=11)
        axes.set_xlabel("probability of the better arm")
        axes.set_xlim(0, 1)
        axes.set_ylim(0)
    figure.axes[0].set_ylabel("variance of one draw, exact")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return figure
