"""The curves of a run: which of its metrics a reader looks at first, and how they are drawn."""

from collections.abc import Sequence
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

from rlhf_fast.report.plots import STYLE, MethodRun
from rlhf_fast.report.styles import styles_of


class Curve(NamedTuple):
    """A panel. The stages name a quantity differently; the panel takes the first of `keys` that a run has."""

    title: str
    keys: tuple[str, ...]


CURVES = {
    "scores": Curve("score of the sampled completions", ("objective/scores",)),
    "held_out": Curve("reward on held-out prompts", ("eval/reward",)),
    "kl": Curve("KL to the reference (nats per completion)", ("objective/kl",)),
    "accuracy": Curve("accuracy on the rows of the step", ("rewards/accuracies", "accuracy")),
    "margin": Curve("margin of the implicit rewards", ("rewards/margins",)),
    "loss": Curve("loss", ("loss", "loss/policy_avg")),
    "value_loss": Curve("loss of the value model", ("loss/value_avg",)),
    "length": Curve("length of the completions (tokens)", ("objective/length",)),
    "entropy": Curve("entropy (nats; of online methods per completion)", ("objective/entropy", "entropy")),
    "grad_norm": Curve("norm of the gradient", ("grad_norm",)),
    "mismatch": Curve("sampler's log-probs against training's (nats per token)", ("mismatch/mean",)),
}
"""Name -> panel, in the order in which they are shown."""


def points(run: MethodRun, curve: Curve) -> tuple[list[int], list[float]]:
    """(steps, values) of the panel's metric; empty where the run has none of its keys. A null is left out."""
    for key in curve.keys:
        rows = [row for row in run.history if isinstance(row.get(key), int | float)]
        if rows:
            return [row["step"] for row in rows], [float(row[key]) for row in rows]
    return [], []


def smoothed(values: Sequence[float]) -> list[float]:
    """The mean of a window of an eleventh of the values around each value; short series stay as they are."""
    half = len(values) // 22
    windows = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def make_curves(runs: Sequence[MethodRun]) -> dict[str, Figure]:
    """Name -> figure of the metric over the steps, a line for each run that has the metric."""
    with matplotlib.rc_context(STYLE):
        return {name: figure for name, curve in CURVES.items() if (figure := _figure(runs, curve)) is not None}


def _figure(runs: Sequence[MethodRun], curve: Curve) -> Figure | None:
    drawn = [(run, steps, values) for run in runs for steps, values in [points(run, curve)] if len(steps) > 1]
    if not drawn:
        return None
    figure, styles = Figure(figsize=(6.4, 3.6)), styles_of(run.name for run in runs)
    axes = figure.add_subplot()
    for run, steps, values in drawn:
        color = styles[run.name].color
        axes.plot(steps, values, color=color, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smoothed(values), color=color, linewidth=1.8, label=run.name)
    axes.set_xlabel("step")
    axes.set_ylabel(curve.title)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1.01), ncols=4, borderaxespad=0, handlelength=1.2)
    return figure
