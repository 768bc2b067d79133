"""`rlhf-fast study exact`: every method in the plane of exact reward and exact KL, against the exact frontier.

The DPO paper's controlled experiment (arXiv 2305.18290, fig. 2 left) where nothing has to be estimated: each point is
the exact expected true reward and exact KL of a policy during training. As in the paper, a method's frontier is
the upper envelope of its points over all strengths. Here the best that any policy can do is known too. The area between
the two is the mean shortfall in reward over the KLs from 0 to `area_to`. Preferences, reward model and rollouts vary
with the seed. "RM optimum" is the closed-form optimum of the learned reward. Its shortfall is the reward model's own;
the difference between it and PPO is the optimiser's.
"""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from rlhf_fast.exact import TabularPolicy, beta_at_kl, expected_reward, frontier, kl, optimum
from rlhf_fast.lab.study.config import ExactStudyConfig
from rlhf_fast.lab.study.envelopes import Point, envelope, mean_error, mean_errors
from rlhf_fast.lab.study.exact_methods import OFFLINE, ONLINE, Update, best_of
from rlhf_fast.lab.study.exact_plots import write_plot
from rlhf_fast.lab.study.exact_world import World, learn_rewards, make_world, sample_pairs
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.training.lock import writes_alone

BETAS = tuple(10 ** (1 - i / 50) for i in range(151))  # of the learned reward's optimum
BEST_OF = tuple(2**i for i in range(11))
GRID = 100  # KLs at which envelope and frontier are compared


@writes_alone("out")
def run(config: ExactStudyConfig) -> None:
    """Trains everything, prints the table, writes exact.json and exact.png to `config.out`."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    world = make_world(config)
    runs = [run for seed in track(range(config.seeds), "seeds") for run in train_all(world, config, seed)]
    record = write_record(out / "exact.json", config, {**summary(world, runs), "runs": runs})
    write_plot(out / "exact.png", record)
    _show(record)


def train_all(world: World, config: ExactStudyConfig, seed: int) -> list[dict[str, Any]]:
    """[{"method", "strength", "seed", "points"}] of one seed, whose runs all start from the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    pairs = sample_pairs(world, config.pairs, generator)
    learned = learn_rewards(world, pairs, config.learning_rate)
    trained = [
        (name, strength, make, world.rewards if name == "PPO-GT" else data)
        for methods, data in ((OFFLINE, pairs), (ONLINE, learned))
        for name, strengths in methods.items()
        for strength, make in strengths.items()
    ]
    runs = []
    for name, strength, make, data in trained:
        policy = world.new_policy()
        update = make(policy, world, data, config, torch.Generator().manual_seed(seed))
        runs.append(_run(name, strength, seed, _train(world, policy, update, config)))
    optima = [(i, optimum(world.ref_logprobs, learned, beta)) for i, beta in enumerate(BETAS)]
    runs.append(_run("RM optimum", "", seed, [_point(world, *one) for one in optima]))
    for name, scores in {"Best-of-N": learned, "Best-of-N-GT": world.rewards}.items():
        points = [_point(world, n, best_of(world, scores, n)) for n in BEST_OF]
        runs.append(_run(name, "", seed, points))
    return runs


def _run(name: str, strength: str, seed: int, points: list[Point]) -> dict[str, Any]:
    return {"method": name, "strength": strength, "seed": seed, "points": points}


def _train(world: World, policy: TabularPolicy, update: Update, config: ExactStudyConfig) -> list[Point]:
    points = []
    for step in range(1, config.steps + 1):
        update()
        if step % config.eval_every == 0 or step == config.steps:
            points.append(_point(world, step, policy().detach()))
    return points


def _point(world: World, step: int, logprobs: Tensor) -> Point:
    return step, kl(logprobs, world.ref_logprobs).item(), expected_reward(logprobs, world.rewards).item()


def summary(world: World, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Frontier; by method the area, the envelope, and its gain over DPO's paired by seed: mean and standard error."""
    largest = -world.ref_logprobs[world.rewards.argmax()].item()
    area_to = 0.8 * largest
    grid = [area_to * i / GRID for i in range(1, GRID + 1)]
    best = frontier(world.ref_logprobs, world.rewards, [beta_at_kl(world.ref_logprobs, world.rewards, k) for k in grid])
    exact = best.reward.tolist()
    start = expected_reward(world.ref_logprobs, world.rewards).item()
    points: dict[str, dict[int, list[Point]]] = {}
    for one in runs:
        points.setdefault(one["method"], {}).setdefault(one["seed"], []).extend(one["points"])
    curves = {name: [envelope(cloud, start, grid) for cloud in by_seed.values()] for name, by_seed in points.items()}
    methods = {}
    for name, seeds in curves.items():
        areas = [_shortfall(exact, curve) for curve in seeds]
        gains = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(seeds, curves["DPO"], strict=True)]
        methods[name] = {
            "area": {"seeds": areas, **mean_error(areas)},
            "envelope": mean_errors(seeds),
            "gain_over_dpo": {
                **mean_error([statistics.fmean(gain) for gain in gains]),
                "envelope": mean_errors(gains),
            },
        }
    return {
        "largest_kl": largest,
        "area_to": area_to,
        "frontier": {"beta": best.beta.tolist(), "kl": grid, "reward": exact},
        "methods": methods,
    }


def _shortfall(frontier: Sequence[float], curve: Sequence[float]) -> float:
    return statistics.fmean(best - reward for best, reward in zip(frontier, curve, strict=True))


def _show(record: dict[str, Any]) -> None:
    seeds, grid = record["config"]["seeds"], record["frontier"]["kl"]
    places = [GRID * i // 5 - 1 for i in range(1, 5)]
    table = Table(title=f"shortfall from the exact frontier, mean over KL 0 to {grid[-1]:.2f}, {seeds} seeds, "
                        "and rewards at four KLs; in brackets the gain over DPO, paired by seed")  # fmt: skip
    for header in ("method", "shortfall", *(f"at KL {grid[i]:.2f}" for i in places)):
        table.add_column(header)
    table.add_row("frontier", "0", *(f"{record['frontier']['reward'][i]:.3f}" for i in places))
    for name, method in sorted(record["methods"].items(), key=lambda item: item[1]["area"]["mean"]):
        gain, curve = method["gain_over_dpo"], method["envelope"]["mean"]
        rewards = (_cell(curve[i], gain["envelope"]["mean"][i], gain["envelope"]["se"][i]) for i in places)
        table.add_row(name, _cell(method["area"]["mean"], gain["mean"], gain["se"]), *rewards)
    Console(width=144).print(table)


def _cell(value: float, gain: float, error: float) -> str:
    return f"{value:.2f} ({gain:+.2f} ± {error:.2f})"
