"""The exact study's figure: points over training on the left, envelopes with error bands on the right."""

from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from rlhf_fast.lab.study.plots import STUDY_STYLES
from rlhf_fast.report.plots import STYLE, band
from rlhf_fast.report.styles import Style, styles_of

_STYLES = STUDY_STYLES | {
    "DPO ipo": Style("#B8860B", "."),
    "DPO hinge": Style("#8B6B00", "."),
    "RM optimum": Style("#555555", "."),
    "Best-of-N-GT": Style("#6655BB", "."),
}
_DASHED = ("PPO-GT", "Best-of-N-GT", "DPO ipo", "DPO hinge", "RM optimum")


def write_plot(path: Path, record: dict[str, Any]) -> None:
    """Of the record that exact.json holds; points are those of seed 0, bands +- one standard error over seeds."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(12, 5.6))
        left, right = figure.subplots(1, 2, sharey=True)
        best = record["frontier"]
        for axes in (left, right):
            axes.plot([0, *best["kl"]], [0, *best["reward"]], color="black", linewidth=2, label="exact frontier")
            axes.set_xlabel("KL to the reference (nats), exact")
            axes.set_xlim(0, record["area_to"])
        left.set_ylabel("expected true reward, exact")
        styles = styles_of(record["methods"], _STYLES)
        for name, method in record["methods"].items():
            color, marker = styles[name]
            style = {"color": color, "linestyle": "--" if name in _DASHED else "-"}
            right.plot(best["kl"], method["envelope"]["mean"], linewidth=1.4, label=name, **style)
            band(right, best["kl"], method["envelope"]["mean"], method["envelope"]["se"], color)
            cloud = [p for run in record["runs"] if run["method"] == name and run["seed"] == 0 for p in run["points"]]
            _, kls, rewards = zip(*cloud, strict=True)
            left.plot(kls, rewards, marker, color=color, markersize=3, alpha=0.7)
        left.set_title("policies during training, one seed", fontsize=11)
        right.set_title("upper envelopes, mean over seeds", fontsize=11)
        figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=5)
        figure.savefig(path, dpi=110)
