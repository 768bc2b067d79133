"""`rlhf-fast study variance`: why the greedy baseline? Gradient norms and variances over training, and in closed form.

Two halves. On language models: several seeds each train a policy by ReMax, and on the way the norm and the total
variance of the policy gradient are measured for REINFORCE, ReMax, RLOO, a learned value and the mean of the batch's
other scores, which costs nothing (`variance_seed`). On the bandit with two arms: the same exactly (`two_armed`), with
the crossover beyond which the greedy baseline raises the variance.

Variances are of equally many sampled completions. ReMax decodes a greedy completion besides each: at equal decoding it
has half as many sampled ones, hence twice the variance. The value model decodes no more but is trained and held.
"""

import datetime
import json
import multiprocessing
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast import demo
from rlhf_fast.checkpoint import write_json
from rlhf_fast.config import PipelineConfig
from rlhf_fast.metrics import print_table
from rlhf_fast.study import two_armed
from rlhf_fast.study.config import VarianceStudyConfig
from rlhf_fast.study.start import pipeline_of
from rlhf_fast.study.variance_plots import write_bandits, write_training
from rlhf_fast.study.variance_seed import METHODS, PANELS, is_measured, measure_seed, measured_file, stages_of
from rlhf_fast.training import mean_and_se

ROWS = {"ReMax": 2}  # decoded per sampled completion; the others' 1


def run(config: VarianceStudyConfig) -> None:
    """Writes variance.json, variance.png and two_armed.png to `config.out`; seeds that are there are kept."""
    out, shorten = Path(config.out), 10 if config.quick else 1
    starts = [pipeline_of(config.pipeline, out, seed, shorten=shorten) for seed in range(config.seeds)]
    missing = [start for start in starts if not is_measured(start, config)]
    if config.pipeline is None and not (out / "data").is_dir():
        demo.write_data(out / "data", 0, shorten)
    _measure(missing, config)
    seeds = [json.loads(measured_file(start).read_text()) for start in starts]
    record = {
        "command": "rlhf-fast " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "config": vars(config),
        "policy": "trained by ReMax from the SFT model",
        "completions": stages_of(starts[0])[0].batch_size,
        **summary([seed["points"] for seed in seeds]),
        "seeds": seeds,
        "two_armed": two_armed.bandits(),
    }
    write_json(out / "variance.json", record)
    write_training(out / "variance.png", record)
    write_bandits(out / "two_armed.png", record["two_armed"])
    _show(record)


def _measure(starts: Sequence[PipelineConfig], config: VarianceStudyConfig) -> None:
    """Every seed in a process of its own, `config.workers` at a time; what they print goes to variance/log.txt."""
    if not starts:
        return
    threads = max(1, torch.get_num_threads() // config.workers)
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    with ProcessPoolExecutor(config.workers, context, torch.set_num_threads, (threads,)) as pool:
        futures = {pool.submit(measure_seed, start, config): start.seed for start in starts}
        for number, future in enumerate(as_completed(futures), 1):
            future.result()
            print(f"[{number}/{len(futures)}] seed {futures[future]} measured", flush=True)


def summary(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means and standard errors over seeds, each a list of points of the same policies along its run.

    panels: kind of score -> estimator -> norm, variance, variance at equal decoding and ratio to REINFORCE's variance,
    paired by seed; each a mean and an error per policy.
    """

    def values(*path: str) -> Tensor:
        """[seeds, policies], what stands there in every point."""
        return torch.tensor([[reduce(getitem, path, point) for point in points] for points in seeds]).double()

    panels: dict[str, dict[str, Any]] = {panel: {} for panel in PANELS}
    for panel, method in product(PANELS, METHODS):
        variance_SP = values("panels", panel, method, "variance")
        panels[panel][method] = {
            "norm": _over_seeds(values("panels", panel, method, "norm")),
            "variance": _over_seeds(variance_SP),
            "variance at equal decoding": _over_seeds(ROWS.get(method, 1) * variance_SP),
            "over REINFORCE": _over_seeds(variance_SP / values("panels", panel, "REINFORCE", "variance")),
        }
    evaluated = [key for key in ("eval/reward", "eval/kl") if key in seeds[0][0]]
    return {
        "rounds": [point["rounds"] for point in seeds[0]],
        **{key: _over_seeds(values(key)) for key in evaluated},
        "panels": panels,
    }


def _over_seeds(x_SP: Tensor) -> dict[str, list[float]]:
    """Means and standard errors; the errors of a single seed are 0."""
    means, errors = zip(*(mean_and_se(x_S) for x_S in x_SP.T), strict=True)
    return {"mean": list(means), "se": list(errors)}


def _show(record: dict[str, Any]) -> None:
    seeds = len(record["seeds"])
    for panel, methods in record["panels"].items():
        rows = []
        for i, rounds in enumerate(record["rounds"]):
            row = {"rounds": rounds} | {m: _cell(figures["variance"], i) for m, figures in methods.items()}
            for name, factor in (("ReMax / REINFORCE", 1), ("the same at equal decoding", ROWS["ReMax"])):
                row[name] = f"{factor * methods['ReMax']['over REINFORCE']['mean'][i]:.3g}"
            rows.append(row)
        print_table(
            f"total variance of the gradient of {record['completions']} sampled completions, scores {panel}; policy "
            f"{record['policy']}; mean ± standard error, {seeds} seed{'s' * (seeds > 1)}",
            rows,
        )
    print_table("the bandit with two arms, exact: variance of one draw, better arm at probability p", two_armed.table())


def _cell(figures: dict[str, list[float]], place: int) -> str:
    return f"{figures['mean'][place]:.3g} ± {figures['se'][place]:.2g}"
