"""`rlhf-fast study winrate`: every method against every other one, prompt by prompt, judged by the true reward.

Each method has one policy per seed, at its main strength. A win counts 1, a tie 1/2; policies of one seed meet on the
same prompts. Rates are means over prompts and seeds; their errors are over seeds.
"""

from pathlib import Path
from typing import Any

from rlhf_fast.lab.study.config import WinRateConfig
from rlhf_fast.lab.study.envelopes import mean_error
from rlhf_fast.lab.study.judge import Judged, judge_all
from rlhf_fast.lab.study.methods import MAIN
from rlhf_fast.lab.study.plots import save, winrate_figure
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import train
from rlhf_fast.training.evaluation import wins
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table


@writes_alone("out")
def run(config: WinRateConfig) -> dict[str, Any]:
    """Trains what is not there yet, prints the matrix, writes winrate.json and winrate.png to `config.out`."""
    cells = train(config, MAIN)
    judged = judge_all(config, cells, cells[0].config.eval_data, [1.0])[1.0]
    content = {"strengths": MAIN, **matrix(judged)}
    record = write_record(Path(config.out) / "winrate.json", config, content)
    save(Path(config.out) / "winrate.png", winrate_figure, record)
    _show(record)
    return record


def matrix(judged: Judged) -> dict[str, Any]:
    """methods, best first by mean reward; rewards; win_rate[a][b] of a over b, each with mean and error over seeds."""
    rewards = {
        method: mean_error([judged.rewards[method, seed].mean().item() for seed in judged.seeds()])
        for method in judged.methods()
    }
    methods = sorted(rewards, key=lambda method: -rewards[method]["mean"])
    rates = {
        a: {
            b: mean_error([wins(judged.rewards[a, s], judged.rewards[b, s]).mean().item() for s in judged.seeds()])
            for b in methods
            if a != b
        }
        for a in methods
    }
    return {"methods": methods, "rewards": {method: rewards[method] for method in methods}, "win_rate": rates}


def _show(record: dict[str, Any]) -> None:
    rows = []
    for a in record["methods"]:
        row: dict[str, Any] = {"wins of": a, "true reward": tuple(record["rewards"][a].values())}
        for b in record["methods"]:
            row[f"over {b}"] = "" if a == b else f"{record['win_rate'][a][b]['mean']:.2f}"
        rows.append(row)
    seeds = record["config"]["seeds"]
    print_table(f"Share of held-out prompts won (ties half), judged by the true reward; {seeds} seeds", rows)
