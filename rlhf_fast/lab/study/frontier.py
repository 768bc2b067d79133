"""`rlhf-fast study frontier`: every method in the plane of true reward and KL to the SFT model.

The DPO paper's controlled experiment (arXiv 2305.18290, fig. 2 left) on trained language models. A point is an
evaluation during training, on held-out prompts: mean true reward, and the mean over completions of the KL summed over
their tokens. A method's frontier is the upper envelope of its points over all strengths, per seed; errors are over
seeds. An envelope takes the best of noisy points, so it lies somewhat high, for all methods.
Best-of-N has no policy: its KL is the bound log N - (N - 1) / N.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_fast.lab.study import best_of
from rlhf_fast.lab.study.config import FrontierConfig
from rlhf_fast.lab.study.envelopes import Point, envelope, mean_error, mean_errors
from rlhf_fast.lab.study.methods import MAIN, STRENGTHS, Cell, given_true_reward
from rlhf_fast.lab.study.plots import frontier_figure, save
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import train
from rlhf_fast.report.pipeline import reward_name_of
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table, read_metrics

GRID = 80  # KLs at which envelopes are taken
BASELINE = "DPO"  # whose envelope the gains are over


@writes_alone("out")
def run(config: FrontierConfig) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes frontier.json and frontier.png to `config.out`."""
    cells = train(config, STRENGTHS if config.strengths == "all" else MAIN)
    runs = [{"method": c.method, "strength": c.strength, "seed": c.seed, "points": points_of(c)} for c in cells]
    content = {
        "reward_name": reward_name_of(cells[0].config.eval_reward),
        "given_true_reward": given_true_reward(cells),
        **summary(runs, config.kl_to),
        "runs": runs,
    }
    record = write_record(Path(config.out) / "frontier.json", config, content)
    save(Path(config.out) / "frontier.png", frontier_figure, record)
    _show(record)
    return record


def points_of(cell: Cell) -> list[Point]:
    """(step, KL, true reward) of every evaluation, the start included; of Best-of-N (N, bound of the KL, reward)."""
    if cell.method == "Best-of-N":
        scores, rewards = best_of.load(cell.directory)
        sizes = [2**i for i in range(scores.shape[1].bit_length())]
        return [(n, best_of.largest_kl(n), best_of.expected_reward(scores, rewards, n).mean().item()) for n in sizes]
    rows = read_metrics(cell.directory / "metrics.jsonl")
    return [(row["step"], row["eval/kl"], row["eval/reward"]) for row in rows if "eval/reward" in row]


def summary(runs: Sequence[dict[str, Any]], kl_to: float) -> dict[str, Any]:
    """By method: the mean of its envelope over KL 0 to kl_to, and its gain over DPO's, paired by seed."""
    grid = torch.linspace(0, kl_to, GRID + 1, dtype=torch.float64)[1:].tolist()
    points: dict[str, dict[int, list[Point]]] = {}
    for one in runs:
        points.setdefault(one["method"], {}).setdefault(one["seed"], []).extend(one["points"])
    starts = {seed: cloud[0][2] for seed, cloud in next(iter(points.values())).items()}  # or Best-of-1's
    curves = {
        method: [envelope(cloud, starts[seed], grid) for seed, cloud in sorted(by_seed.items())]
        for method, by_seed in points.items()
    }
    methods = {}
    for method, seeds in curves.items():
        means = [statistics.fmean(curve) for curve in seeds]
        methods[method] = {"mean_reward": mean_error(means), "envelope": mean_errors(seeds)}
        if BASELINE in curves:
            gains = [mean - statistics.fmean(other) for mean, other in zip(means, curves[BASELINE], strict=True)]
            above = sum(gain > 0 for gain in gains)
            methods[method]["gain_over_dpo"] = {**mean_error(gains), "seeds": gains, "seeds_above": above}
    return {"kl": grid, "start_reward": mean_error([starts[seed] for seed in sorted(starts)]), "methods": methods}


def _show(record: dict[str, Any]) -> None:
    seeds, grid = record["config"]["seeds"], record["kl"]
    places = [GRID * i // 8 - 1 for i in (1, 2, 4, 8)]
    rows = []
    for name, method in sorted(record["methods"].items(), key=lambda item: -item[1]["mean_reward"]["mean"]):
        curve, row = method["envelope"], {"method": name, "mean reward": _pair(method["mean_reward"])}
        if name != BASELINE and "gain_over_dpo" in method:
            row["gain over DPO"] = _pair(method["gain_over_dpo"])
            row["above it"] = f"{method['gain_over_dpo']['seeds_above']} of {seeds} seeds"
        row |= {f"at KL {grid[i]:g}": (curve["mean"][i], curve["se"][i]) for i in places}
        rows.append(row)
    title = f"True reward of the upper envelopes, mean over KL 0 to {grid[-1]:g} and at four KLs; {seeds} seeds"
    print_table(title, rows)
    if record["given_true_reward"]:
        print(f"Given the true reward itself, as PPO-GT is: {', '.join(record['given_true_reward'])}")


def _pair(value: dict[str, float]) -> tuple[float, float]:
    return value["mean"], value["se"]
