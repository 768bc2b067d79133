"""`rlhf-fast study variance`: why the greedy baseline? Gradient norms and variances over training, and in closed form.

Two halves. On language models: several seeds each train a policy by ReMax, and on the way the norm and the total
variance of the policy gradient are measured for REINFORCE, ReMax, RLOO, a learned value and the mean of the batch's
other scores, which costs nothing (`variance_seed`). On the bandit with two arms: the same exactly (`two_armed`), with
the crossover beyond which the greedy baseline raises the variance.

Variances are of equally many sampled completions. ReMax decodes a greedy completion besides each: at equal decoding it
has half as many sampled ones, hence twice the variance. The value model decodes no more but is trained and held.
"""

from collections.abc import Sequence
from functools import reduce
from itertools import product
from operator import getitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_fast.data.damage import read_json
from rlhf_fast.lab.study import two_armed
from rlhf_fast.lab.study.config import VarianceStudyConfig
from rlhf_fast.lab.study.envelopes import mean_errors
from rlhf_fast.lab.study.plots import save
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import Job, is_made_with, prepare_starts, run_jobs
from rlhf_fast.lab.study.variance_plots import TITLES, bandit_figure, training_figure
from rlhf_fast.lab.study.variance_seed import METHODS, PANELS, measure_seed, measured_file, read_by, settings, stages_of
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table

ROWS = {"ReMax": 2}  # rows decoded per sampled completion; 1 for the other estimators


@writes_alone("out")
def run(config: VarianceStudyConfig) -> dict[str, Any]:
    """Measures the seeds that are not there yet; writes variance.json and its figures to `config.out`."""
    out, starts = Path(config.out), prepare_starts(config)
    jobs = [
        Job(f"ReMax and gradient variance, seed {start.seed}", file.with_name("log.txt"), measure_seed, (start, config))
        for start, file in ((start, measured_file(start)) for start in starts)
        if not is_made_with(file, settings(start, config), read_by(start))
    ]
    run_jobs(jobs, config.workers)
    seeds = [read_json(measured_file(start)) for start in starts]
    content = {
        "policy": "trained by ReMax from the SFT model",
        "completions": stages_of(starts[0])[0].batch_size,
        **summary([seed["points"] for seed in seeds]),
        "seeds": seeds,
        "two_armed": two_armed.bandits(),
    }
    record = write_record(out / "variance.json", config, content)
    save(out / "variance.png", training_figure, record)
    save(out / "two_armed.png", bandit_figure, record)
    _show(record)
    return record


def summary(seeds: Sequence[Sequence[dict[str, Any]]]) -> dict[str, Any]:
    """Means and standard errors over seeds, each a list of points of the same policies along its run.

    panels: kind of score -> estimator -> norm, variance, variance at equal decoding and ratio to REINFORCE's variance,
    paired by seed; each a mean and an error per policy.
    """

    def values(*path: str) -> Tensor:
        """[seeds, policies], the number under these keys in every point."""
        rows = [[reduce(getitem, path, point) for point in points] for points in seeds]
        return torch.tensor(rows, dtype=torch.float64)

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
    return mean_errors(x_SP.tolist())


def _show(record: dict[str, Any]) -> None:
    title = (
        f"Total variance of the gradient of {record['completions']} sampled completions; policy {record['policy']}; "
        f"{len(record['seeds'])} seeds; "
    )
    for panel, methods in record["panels"].items():
        columns = {method: figures["variance"] for method, figures in methods.items()}
        ratio = methods["ReMax"]["over REINFORCE"]
        columns["ReMax / REINFORCE"] = ratio
        columns["at equal decoding"] = {key: [ROWS["ReMax"] * x for x in column] for key, column in ratio.items()}
        rows = [
            {"rounds": rounds, **{name: (x["mean"][i], x["se"][i]) for name, x in columns.items()}}
            for i, rounds in enumerate(record["rounds"])
        ]
        print_table(title + TITLES[panel], rows)
    bandit = "The bandit with two arms, exact: variance of one draw, the better arm has probability p"
    print_table(bandit, two_armed.table())
