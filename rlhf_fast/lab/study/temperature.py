"""`rlhf-fast study temperature`: win rate against the rows' own completions over the sampling temperature.

The DPO paper's figure 2, right (arXiv 2305.18290), with the true reward in the judge's place. Every method's policy was
trained at temperature 1; Best-of-N chooses among completions of the SFT model drawn at that temperature.
"""

from pathlib import Path
from typing import Any

from rlhf_fast.lab.study.config import TemperatureConfig
from rlhf_fast.lab.study.envelopes import mean_error
from rlhf_fast.lab.study.judge import ROWS, judge_all
from rlhf_fast.lab.study.methods import MAIN
from rlhf_fast.lab.study.plots import save, temperature_figure
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import train
from rlhf_fast.training.evaluation import wins
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table


@writes_alone("out")
def run(config: TemperatureConfig) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes temperature.json and temperature.png to `config.out`."""
    cells = train(config, MAIN)
    judged = judge_all(config, cells, cells[0].config.eval_data, sorted(config.temperatures))
    methods = [method for method in next(iter(judged.values())).methods() if method != ROWS]
    content = {
        "strengths": MAIN,
        "methods": {
            method: {
                f"{temperature:g}": mean_error(
                    [wins(at.rewards[method, s], at.rewards[ROWS, s]).mean().item() for s in at.seeds()]
                )
                for temperature, at in judged.items()
            }
            for method in methods
        },
    }
    record = write_record(Path(config.out) / "temperature.json", config, content)
    save(Path(config.out) / "temperature.png", temperature_figure, record)
    rows = [
        {"method": method, **{f"T = {t}": (rate["mean"], rate["se"]) for t, rate in rates.items()}}
        for method, rates in record["methods"].items()
    ]
    print_table(f"Win rate against the held-out rows' completions over temperature; {config.seeds} seeds", rows)
    return record
