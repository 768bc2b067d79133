"""python curves.py OUT.json NAME=DIR [NAME=DIR...]: the curves of runs side by side, as JSON and as a picture.

OUT.json has the main metrics of every step and, for each run after the first, the largest difference of each metric
from the first run's. OUT.png has the curves.
"""

import json
import sys
from itertools import cycle
from pathlib import Path

from matplotlib import pyplot
from matplotlib.ticker import MaxNLocator

from rlhf_fast.training.metrics import read_metrics

SHOWN = {
    "objective/scores": "score of the sampled completions",
    "objective/kl": "KL to the reference (nats per completion)",
    "loss": "loss",
    "loss/policy_avg": "policy loss",
    "rewards/margins": "margin of the implicit rewards",
    "rewards/accuracies": "accuracy",
    "grad_norm": "norm of the gradient",
    "eval/reward": "reward on held-out prompts",
    "eval/reward_se": "",
    "mismatch/mean": "sampler's log-probs against training's (nats per token)",
}
FIGURES = ("objective/scores", "objective/kl", "loss", "rewards/margins")


def main() -> None:
    """Reads the runs and writes both files."""
    out, runs = Path(sys.argv[1]), dict(argument.split("=", 1) for argument in sys.argv[2:])
    curves = {name: read_metrics(Path(directory, "metrics.jsonl")) for name, directory in runs.items()}
    first, *others = curves
    common = min(rows[-1]["step"] for rows in curves.values())
    rows = {name: [row for row in found if row["step"] <= common] for name, found in curves.items()}
    content = {
        "environment": json.loads(Path(runs[first], "run.json").read_text())["environment"],
        "steps": common,
        "runs": {
            name: [{k: row[k] for k in ("step", *SHOWN) if k in row} for row in found] for name, found in rows.items()
        },
        "largest_difference": {name: differences(rows[first], rows[name]) for name in others},
    }
    out.write_text(json.dumps(content, indent=1) + "\n")
    shown = [key for key in FIGURES if any(key in row for row in rows[first])]
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5.2 * len(shown), 3.4), layout="constrained", squeeze=False)
    for key, axis in zip(shown, axes[0], strict=True):
        for style, (name, found) in zip(cycle(("-", "--", ":", "-.")), rows.items(), strict=False):
            points = [(row["step"], row[key]) for row in found if key in row]
            axis.plot(*zip(*points, strict=True), style, label=name)
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.set_title(SHOWN[key], fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(out.with_suffix(".png"), dpi=120)
    for name, found in content["largest_difference"].items():
        print(f"{name} against {first}:", {key: f"{value:.2g}" for key, value in found.items()})


def differences(mine: list[dict], theirs: list[dict]) -> dict[str, float]:
    """Metric -> the largest absolute difference over the steps that both runs have."""
    pairs = list(zip(mine, theirs, strict=True))
    return {
        key: max(abs(a[key] - b[key]) for a, b in pairs if key in a and key in b)
        for key in SHOWN
        if any(key in a and key in b for a, b in pairs)
    }


main()
