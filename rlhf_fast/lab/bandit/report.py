"""The bandits' results as JSON, console tables and figures.

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

from rlhf_fast.lab.bandit.problem import ACTIONS, Setting, policy, true_rewards
from rlhf_fast.report.plots import STYLE
from rlhf_fast.training.metrics import print_table

# arXiv 2312.10584, figures 3 and 4 and the neural ablation: means of 10 seeds, no error bars in the text; beta = 0.01.
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
    "additive": {
        "dpo_published": 0.4353,
        "rmb_po": 0.323,
        "rmb_po_plus@2": 0.1967,
        "rmb_po_plus@5": 0.1923,
        "rmb_po_plus@10": 0.1855,
    },
}
_PUBLISHED_N = {"linear": 20, "neural": 50}
SAME = 1e-8  # gaps closer than this are equal: the solvers' own error
_COLORS = {"dpo": "#E69F00", "dpo_published": "#F0E442", "rmb_po": "#0072B2", "rmb_po_plus": "#009E73"}
_LABELS = {"dpo": "DPO", "dpo_published": "DPO, published form", "rmb_po": "RMB-PO", "rmb_po_plus": "RMB-PO+"}
_MATCHED = "_matched_steps"


def published_of(bandit: str, setting: str, n: int, beta: float) -> dict[str, float]:
    """Method -> published gap, where these very settings were published."""
    return PUBLISHED.get(setting, {}) if (n, beta) == (_PUBLISHED_N[bandit], 0.01) else {}


def summary(gaps: Tensor) -> dict[str, Any]:
    """Mean and standard error over seeds [S], and the interval of a mean of 10 further seeds."""
    mean, deviation, size = gaps.mean().item(), gaps.std().item(), len(gaps)
    half = NormalDist().inv_cdf(0.975) * deviation * (1 / 10 + 1 / size) ** 0.5
    return {"mean": mean, "se": deviation / size**0.5, "interval_of_10": [mean - half, mean + half]}


def summaries(gaps: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """`summary` of every entry."""
    return {name: summary(gap) for name, gap in gaps.items()}


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
    rows = []
    for name, method in record["methods"].items():
        low, high = method.get("published_evaluation", method)["interval_of_10"]
        published = method["published"]
        row = {"method": name, "gap": (method["mean"], method["se"]), "10 seeds": f"{low:.3f} to {high:.3f}"}
        row |= {"steps": method["steps"]} if "steps" in method else {}
        row["published"] = "-" if published is None else f"{published:.4f}"
        row["inside"] = "-" if published is None else "yes" if low <= published <= high else "no"
        rows.append(row)
    kind = "features" if record["bandit"] == "linear" else "reward"
    print_table(
        f"Optimality gap, {record['setting']} {kind}, n = {record['n']}, {record['mode']} mode, "
        f"{record['seeds']} seeds; published: mean of 10 seeds, and where such a mean falls (95 %)",
        rows,
    )
    shown = _shown(record["methods"])
    print_table(
        f"Paired differences (5 % level, Bonferroni over {len(record['paired'])} pairs; all of them are in the JSON)",
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
            if set(name.split(" - ")) <= set(shown)
        ],
    )
    if "references" in record:
        share = record["commonest_best_action"]
        print_table(
            f"For comparison (the commonest best action is best in {share['mean']:.3f} of the states)",
            [{"policy": name, "gap": (x["mean"], x["se"])} for name, x in record["references"].items()],
        )
    if "error_sources" in record:
        print_table(
            "Change of the gap where one piece is exact (negative: that piece costs so much)",
            [
                {"method": name, **{piece: (x["mean"], x["se"]) for piece, x in pieces.items()}}
                for name, pieces in record["error_sources"].items()
            ],
        )


def write_plots(record: Mapping[str, Any], stem: Path, thetas: Mapping[str, Tensor] | None = None) -> list[Path]:
    """Writes <stem>_gap.png, and _ratio.png, _n.png and _policies.png if there are ratios, sizes and thetas.

    Returns their paths.
    """
    with matplotlib.rc_context(STYLE):
        figures = {"gap": bars(record)}
        if record["ratios"]:
            figures["ratio"] = against_ratio(record)
        if record["by_n"]:
            figures["n"] = against_n(record)
        if thetas is not None:
            figures["policies"] = policies(thetas, record["setting"])
        paths = [stem.with_name(f"{stem.name}_{name}.png") for name in figures]
        for path, figure in zip(paths, figures.values(), strict=True):
            figure.savefig(path, dpi=130)
    return paths


def bars(record: Mapping[str, Any]) -> Figure:
    """Mean gap of every method with its standard error; diamonds are the published means."""
    methods = record["methods"]
    figure, axes = _figure(height=1.6 + 0.42 * len(methods))
    places = range(len(methods))
    for i, (name, method) in zip(places, methods.items(), strict=True):
        axes.barh(i, method["mean"], xerr=method["se"], color=_color(name), alpha=_alpha(name), capsize=4, height=0.66)
    published = {i: x["published"] for i, x in zip(places, methods.values(), strict=True) if x["published"] is not None}
    if published:
        axes.plot(list(published.values()), list(published), "D", color="#333333", label="published, 10 seeds")
        figure.legend(loc="outside lower center")
    axes.set_yticks(places, [_label(name) for name in methods])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(_gap_label(record))
    return figure


def against_ratio(record: Mapping[str, Any]) -> Figure:
    """Gap against m/n; a method that does not see the new states is a level line."""
    figure, axes = _figure()
    axes.set_ylabel(_gap_label(record))
    methods = record["methods"]
    for name in (name for name in methods if not name.startswith("rmb_po_plus")):
        mean, error = methods[name]["mean"], methods[name]["se"]
        axes.axhline(mean, color=_color(name), linestyle=_line(name), label=_label(name))
        axes.axhspan(mean - error, mean + error, color=_color(name), alpha=0.12, linewidth=0)
    ratios = sorted(record["ratios"])
    for suffix in ("", _MATCHED):
        names = [f"rmb_po_plus@{ratio:g}{suffix}" for ratio in ratios]
        if set(names) <= set(methods):
            label = "RMB-PO+, RMB-PO's steps" if suffix else "RMB-PO+"
            _errorbar(axes, ratios, [methods[name] for name in names], names[-1], label)
    axes.set_xlabel("new states per preference, m/n")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def against_n(record: Mapping[str, Any]) -> Figure:
    """Gap against the number of preferences; of RMB-PO+ the largest ratio."""
    figure, axes = _figure()
    axes.set_ylabel(_gap_label(record))
    sizes = sorted(record["by_n"], key=int)
    numbers = [int(size) for size in sizes]
    for name in _shown(record["methods"]):
        _errorbar(axes, numbers, [record["by_n"][size][name] for size in sizes], name, _label(name))
    axes.set_xscale("log")
    axes.set_xticks(numbers, sizes)
    axes.minorticks_off()
    axes.set_xlabel("preferences, n")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def policies(thetas: Mapping[str, Tensor], setting: Setting) -> Figure:
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


def _gap_label(record: Mapping[str, Any]) -> str:
    return f"optimality gap,\nmean ± standard error, {record['seeds']} seeds"


def _figure(height: float = 4.6) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, height))
    return figure, figure.add_subplot()


def _errorbar(axes: Axes, x: Sequence[float], points: Sequence[Mapping[str, Any]], name: str, label: str) -> None:
    style = {"color": _color(name), "linestyle": _line(name), "marker": "o", "capsize": 4, "label": label}
    axes.errorbar(x, [point["mean"] for point in points], [point["se"] for point in points], **style)


def _shown(methods: Mapping[str, Any]) -> list[str]:
    """All methods, but of RMB-PO+ only the largest ratio."""
    ratios = {name: float(_parts(name)[1]) for name in methods if "@" in name}
    return [name for name in methods if ratios.get(name) in (None, max(ratios.values(), default=None))]


def _parts(name: str) -> tuple[str, str, bool]:
    """Method, ratio or "", whether the steps are matched."""
    method, _, ratio = name.removesuffix(_MATCHED).partition("@")
    return method, ratio, name.endswith(_MATCHED)


def _label(name: str) -> str:
    method, ratio, matched = _parts(name)
    if matched and method == "rmb_po":
        return f"RMB-PO, steps of m/n={ratio}"
    return _LABELS[method] + f" m/n={ratio}" * bool(ratio) + ", RMB-PO's steps" * matched


def _color(name: str) -> str:
    return _COLORS[_parts(name)[0]]


def _line(name: str) -> str:
    return "--" if _parts(name)[2] else "-"


def _alpha(name: str) -> float:
    return 0.5 if _parts(name)[2] else 1.0
