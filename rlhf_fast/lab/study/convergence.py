"""`rlhf-fast study convergence`: win rate against the rows' own completions over training (arXiv 2305.18290, fig. 3).

A step of DPO sees pairs; a step of an online method samples completions, scores them and learns from them. The figure
therefore has two axes: the share of the run, and training seconds without evaluations (runs of a study share the
machine's cores).
"""

from pathlib import Path
from typing import Any

from rlhf_fast.lab.study.config import ConvergenceConfig
from rlhf_fast.lab.study.envelopes import mean_error
from rlhf_fast.lab.study.methods import MAIN, Cell
from rlhf_fast.lab.study.plots import convergence_figure, save
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import train
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table, read_metrics


@writes_alone("out")
def run(config: ConvergenceConfig) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes convergence.json and convergence.png to `config.out`."""
    cells = train(config, {method: strengths for method, strengths in MAIN.items() if method != "Best-of-N"})
    by_method: dict[str, list[Cell]] = {}
    for cell in cells:
        by_method.setdefault(cell.method, []).append(cell)
    methods = {method: _curve(own) for method, own in by_method.items()}
    record = write_record(Path(config.out) / "convergence.json", config, {"strengths": MAIN, "methods": methods})
    save(Path(config.out) / "convergence.png", convergence_figure, record)
    rows = []
    for method, curve in methods.items():
        parts = len(curve["win_rate"]) - 1
        shown = {f"{i}/{parts} of the run": tuple(rate.values()) for i, rate in enumerate(curve["win_rate"])}
        rows.append({"method": method, "steps": curve["step"][-1], "seconds": curve["seconds"][-1]["mean"], **shown})
    print_table(f"Win rate against the held-out rows' completions over training; {config.seeds} seeds", rows)
    return record


def _curve(cells: list[Cell]) -> dict[str, list[Any]]:
    """Over the evaluations: step, and over the seeds seconds and win rate."""
    columns: list[tuple[list[Any], ...]] = []
    for cell in cells:
        rows = [row for row in read_metrics(cell.directory / "metrics.jsonl") if "eval/reward" in row]
        if "eval/win_rate" not in rows[0]:
            raise ValueError(f"{cell.config.eval_data}: expected a completion column in every row, to compare with")
        names = ("step", "time/total", "eval/win_rate")
        columns.append(tuple([row[name] for row in rows] for name in names))
    # seeds differ somewhat in their number of pairs, and so of offline steps
    fewest = min(len(steps) for steps, _, _ in columns)
    steps, seconds, rates = zip(*([[*x[: fewest - 1], x[-1]] for x in own] for own in columns), strict=True)
    return {
        "step": steps[0],
        "seconds": [mean_error(column) for column in zip(*seconds, strict=True)],
        "win_rate": [mean_error(column) for column in zip(*rates, strict=True)],
    }
