"""The bandit's results as JSON, console tables and figures.

A published figure is the mean of 10 seeds, so it is set beside the interval in which the mean of 10 further seeds of
ours would fall 95 times in 100, not beside our mean's own error.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import NormalDist
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from rlhf_fast.bandit.problem import ACTIONS, policy, true_rewards
from rlhf_fast.metrics import print_table
from rlhf_fast.plots import STYLE

# arXiv 2312.10584, figures 3 and 4: n = 20, beta = 0.01, means of 10 seeds, no error bars in the text.
PUBLISHED = {
    "matched": {
        "dpo": 0.0865,
        "rmb_po": 0.0688,
        "rmb_po_plus@2": 0.0651,
        "rmb_po_plus@5": 0.0647,
        "rmb_po_plus@10": 0.0652,
    },
    "mismatched": {
        "dpo": 0.4871,
        "rmb_po": 0.2828,
        "rmb_po_plus@2": 0.2676,
        "rmb_po_plus@5": 0.2653,
        "rmb_po_plus@10": 0.2685,
    },
}
SAME = 1e-8  # gaps closer than this are equal: the solvers' own error
_COLORS = {"dpo": "#E69F00", "rmb_po": "#0072B2"}
_PLUS_COLOR = "#009E73"


def published_of(setting: str, n: int, beta: float) -> dict[str, float]:
    """Method -> published gap, where these very settings were published."""
    return PUBLISHED[setting] if (n, beta) == (20, 0.01) else {}


def summary(gaps: Tensor) -> dict[str, Any]:
    """Mean and standard error over seeds [S], and the interval of a mean of 10 further seeds."""
    mean, deviation, size = gaps.mean().item(), gaps.std().item(), len(gaps)
    half = NormalDist().inv_cdf(0.975) * deviation * (1 / 10 + 1 / size) ** 0.5
    return {"mean": mean, "se": deviation / size**0.5, "interval_of_10": [mean - half, mean + half]}


def paired(gaps: Mapping[str, Tensor]) -> dict[str, Any]:
    """Differences of every two methods over the same seeds: mean, its standard error, z, and whether it is significant
    at 5 % with Bonferroni's correction for the number of pairs."""
    pairs = list(combinations(gaps, 2))
    threshold = NormalDist().inv_cdf(1 - 0.025 / len(pairs))
    z, detail = {}, {}
    for first, second in pairs:
        difference = gaps[first] - gaps[second]
        equal = difference.abs().max().item() < SAME
        mean, error = difference.mean().item(), difference.std().item() / len(difference) ** 0.5
        name = f"{first} - {second}"
        z[name] = 0.0 if equal else mean / error
        detail[name] = {"mean": mean, "se": error, "equal": equal, "significant": abs(z[name]) > threshold}
    return {"paired_z": z, "paired": detail, "paired_threshold": threshold}


def show(record: Mapping[str, Any]) -> None:
    """Tables on the console."""
    published = published_of(record["setting"], record["n"], record["beta"])
    rows = []
    for name, method in record["methods"].items():
        low, high = method["published_evaluation"]["interval_of_10"]
        row = {"method": name, "gap": (method["mean"], method["se"]), "10 seeds": f"{low:.3f} to {high:.3f}"}
        row["published"] = f"{published[name]:.4f}" if name in published else "-"
        row["inside"] = ("yes" if low <= published[name] <= high else "no") if name in published else "-"
        rows.append(row)
    print_table(
        f"Optimality gap, {record['setting']} features, n = {record['n']}, {record['mode']} mode, "
        f"{record['seeds']} seeds; published: mean of 10 seeds, and where such a mean falls (95 %)",
        rows,
    )
    print_table(
        "Paired differences (5 % level, Bonferroni)",
        [
            {
                "difference": name,
                "mean": (pair["mean"], pair["se"]),
                "z": f"{record['paired_z'][name]:.2f}",
                "verdict": "equal"
                if pair["equal"]
                else "significant"
                if pair["significant"]
                else "no significant difference",
            }
            for name, pair in record["paired"].items()
        ],
    )
    if "error_sources" in record:
        print_table(
            "Change of the gap where one piece is exact (negative: that piece costs so much)",
            [
                {"method": name, **{piece: (x["mean"], x["se"]) for piece, x in pieces.items()}}
                for name, pieces in record["error_sources"].items()
            ],
        )


def write_plots(record: Mapping[str, Any], thetas: Mapping[str, Tensor], stem: Path) -> list[Path]:
    """Writes <stem>_gap.png, _ratio.png, _policies.png and, with sizes, _n.png; returns their paths."""
    with matplotlib.rc_context(STYLE):
        figures = {"gap": bars(record), "policies": policies(thetas, record["setting"])}
        if record["ratios"]:
            figures["ratio"] = against_ratio(record)
        if record["by_n"]:
            figures["n"] = against_n(record)
        paths = [stem.with_name(f"{stem.name}_{name}.png") for name in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            figure.savefig(path, dpi=130)
    return paths


def bars(record: Mapping[str, Any]) -> Figure:
    """Mean gap of every method with its standard error; diamonds are the published means."""
    figure, axes = _figure()
    published = published_of(record["setting"], record["n"], record["beta"])
    for i, (name, method) in enumerate(record["methods"].items()):
        axes.bar(i, method["mean"], yerr=method["se"], color=_color(name), capsize=4, width=0.66)
        if name in published:
            label = "published, 10 seeds" if name == "dpo" else None
            axes.plot(i, published[name], marker="D", color="#333333", linestyle="", label=label)
    axes.set_xticks(range(len(record["methods"])), [_label(name).replace(" ", "\n") for name in record["methods"]])
    axes.grid(axis="x", visible=False)
    if published:
        axes.legend()
    return figure


def against_ratio(record: Mapping[str, Any]) -> Figure:
    """Gap against m/n; DPO and RMB-PO do not see the new states."""
    figure, axes = _figure()
    methods = record["methods"]
    for name in ("dpo", "rmb_po"):
        mean, error = methods[name]["mean"], methods[name]["se"]
        axes.axhline(mean, color=_color(name), label=_label(name))
        axes.axhspan(mean - error, mean + error, color=_color(name), alpha=0.12, linewidth=0)
    ratios = sorted(record["ratios"])
    plus = [methods[f"rmb_po_plus@{ratio:g}"] for ratio in ratios]
    axes.errorbar(
        ratios,
        [x["mean"] for x in plus],
        [x["se"] for x in plus],
        color=_PLUS_COLOR,
        marker="o",
        capsize=4,
        label="RMB-PO+",
    )
    axes.set_xlabel("new states per preference, m/n")
    axes.legend()
    return figure


def against_n(record: Mapping[str, Any]) -> Figure:
    """Gap against the number of preferences; of RMB-PO+ the largest ratio."""
    figure, axes = _figure()
    sizes = sorted(record["by_n"], key=int)
    for name in _shown(record["methods"]):
        points = [record["by_n"][size][name] for size in sizes]
        style = {"color": _color(name), "marker": "o", "capsize": 4, "label": _label(name)}
        axes.errorbar([int(size) for size in sizes], [x["mean"] for x in points], [x["se"] for x in points], **style)
    axes.set_xscale("log")
    axes.set_xticks([int(size) for size in sizes], sizes)
    axes.minorticks_off()
    axes.set_xlabel("preferences, n")
    axes.legend()
    return figure


def policies(thetas: Mapping[str, Tensor], setting: str) -> Figure:
    """Probability of every action over the states, mean over seeds; first the best action under the true reward."""
    states = torch.linspace(0, 1, 401, dtype=torch.float64)
    panels = {"best action": torch.nn.functional.one_hot(true_rewards(states).argmax(-1), ACTIONS)}
    panels |= {_label(name): policy(thetas[name], states, setting).mean(0) for name in _shown(thetas)}
    figure = Figure(figsize=(3.2 * len(panels), 3.4))
    shades = ("#88CCEE", "#DDCC77", "#CC6677", "#332288")
    for axes, (title, probability) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.stackplot(states.tolist(), probability.T.tolist(), colors=shades, labels=[f"action {a}" for a in range(4)])
        axes.set(title=title, xlim=(0, 1), ylim=(0, 1), xlabel="state")
    figure.axes[0].set_ylabel("probability")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=ACTIONS)
    return figure


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.2))
    axes = figure.add_subplot()
    axes.set_ylabel("optimality gap")
    return figure, axes


def _shown(methods: Mapping[str, Any]) -> Sequence[str]:
    """DPO, RMB-PO and the RMB-PO+ with most new states."""
    plus = sorted((name for name in methods if "@" in name), key=lambda name: float(name.split("@")[1]))
    return ["dpo", "rmb_po", *plus[-1:]]


def _label(name: str) -> str:
    return {"dpo": "DPO", "rmb_po": "RMB-PO"}.get(name) or f"RMB-PO+ m/n={name.split('@')[1]}"


def _color(name: str) -> str:
    return _COLORS.get(name, _PLUS_COLOR)
