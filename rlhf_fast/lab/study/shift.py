"""`rlhf-fast study shift`: the trained policies on prompts of another domain (arXiv 2305.18290, section 6.3).

The embedded world's other domain consists of reviews of the same words in other proportions: mostly negated, joined by
"but", and facts (`world.SHIFTED`). Beside the policies of the other studies stand PPO+ and ReMax+, whose rollouts start
from prompts of both domains, with the same reward model: unlabelled out-of-preference prompts (arXiv 2312.10584).
"""

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from rlhf_fast.data.encoding import load_rows
from rlhf_fast.data.rows import Row, write_rows
from rlhf_fast.lab import world
from rlhf_fast.lab.study.config import ShiftConfig
from rlhf_fast.lab.study.envelopes import mean_error
from rlhf_fast.lab.study.judge import ROWS, SFT, Judged, judge_all
from rlhf_fast.lab.study.methods import MAIN, Cell
from rlhf_fast.lab.study.plots import save, shift_figure
from rlhf_fast.lab.study.records import write_record
from rlhf_fast.lab.study.runs import train, train_cells
from rlhf_fast.report.pipeline import reward_name_of
from rlhf_fast.training.evaluation import wins
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.metrics import print_table

EVALUATED = 256  # prompts of the other domain, at most half of them; rollouts start from the others
BOTH_DOMAINS = ("PPO", "ReMax")


@writes_alone("out")
def run(config: ShiftConfig) -> dict[str, Any]:
    """Trains what is not there yet, prints the table, writes shift.json and shift.png to `config.out`."""
    cells = train(config, MAIN)
    data = Path(config.out) / "shift"
    held_out, training = _split(config, cells[0].config.columns)
    data.mkdir(exist_ok=True)
    write_rows(data / "shifted.jsonl", held_out)
    online = [cell for cell in cells if cell.method in BOTH_DOMAINS]
    if online:
        names = online[0].config.columns
        own = load_rows(online[0].config.train_data, "prompt", names)
        # under the data's own names, because one mapping reads these rows and eval_data
        rows = [{names.get(name, name): value for name, value in row.items()} for row in (*own, *training)]
        write_rows(data / "prompts.jsonl", rows)
    both = [_on_both(cell, data / "prompts.jsonl") for cell in online]
    train_cells(both, config.workers)
    policies, own_data = [*cells, *both], cells[0].config
    judged = {
        "own": judge_all(config, policies, own_data.eval_data, [1.0], own_data.columns)[1.0],
        "shifted": judge_all(config, policies, str(data / "shifted.jsonl"), [1.0], {})[1.0],
    }
    content = {"reward_name": reward_name_of(cells[0].config.eval_reward), "strengths": MAIN, **summary(judged)}
    record = write_record(Path(config.out) / "shift.json", config, content)
    save(Path(config.out) / "shift.png", shift_figure, record)
    _show(record)
    return record


def summary(judged: dict[str, Judged]) -> dict[str, Any]:
    """By domain and method: reward, gain over SFT, win rate over SFT and over the rows' completions, over seeds."""
    return {
        "domains": {
            domain: {method: _figures(at.rewards, method, at.seeds()) for method in at.methods()}
            for domain, at in judged.items()
        }
    }


def _figures(rewards: dict[tuple[str, int], Tensor], method: str, seeds: list[int]) -> dict[str, dict[str, float]]:
    triples = [(rewards[method, seed], rewards[SFT, seed], rewards[ROWS, seed]) for seed in seeds]
    per_seed = {
        "reward": [own for own, _, _ in triples],
        "gain_over_sft": [own - sft for own, sft, _ in triples],
        "wins_over_sft": [wins(own, sft) for own, sft, _ in triples],
        "wins_over_rows": [wins(own, rows) for own, _, rows in triples],
    }
    return {name: mean_error([value.mean().item() for value in values]) for name, values in per_seed.items()}


def _split(config: ShiftConfig, columns: dict[str, str]) -> tuple[list[Row], list[Row]]:
    """Rows of the other domain, in our form, to evaluate on, and others to roll out from. columns: of shift_data."""
    if config.shift_data is None:
        shorten = 10 if config.quick else 1
        rows = world.prompt_rows(6500 // shorten, seed=7, completions=True, style=world.SHIFTED)
    else:
        rows = load_rows(config.shift_data, "prompt", columns)
        if len(rows) < 2:
            raise ValueError(f"shift_data: expected at least 2 rows, got {len(rows)} in {config.shift_data}")
    evaluated = min(EVALUATED, len(rows) // 2)
    return rows[:evaluated], rows[evaluated:]


def _on_both(cell: Cell, prompts: Path) -> Cell:
    directory = cell.directory.with_name(f"{cell.directory.name}-both-domains")
    config = dataclasses.replace(cell.config, train_data=str(prompts), output_dir=str(directory))
    return cell._replace(method=f"{cell.method}+", config=config)


def _show(record: dict[str, Any]) -> None:
    own, shifted = (record["domains"][name] for name in ("own", "shifted"))
    rows = []
    for method in sorted(shifted, key=lambda name: -shifted[name]["reward"]["mean"]):
        row: dict[str, Any] = {"method": method}
        for name, domain in (("own", own), ("shifted", shifted)):
            for key in ("reward", "gain_over_sft", "wins_over_rows"):
                row[f"{name}: {key.replace('_', ' ')}"] = tuple(domain[method][key].values())
        rows.append(row)
    print_table(f"True reward on the prompts' own domain and on another; {record['config']['seeds']} seeds", rows)
