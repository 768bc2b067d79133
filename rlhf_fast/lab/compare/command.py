"""`rlhf-fast compare`: run the cells, put their figures into tables, JSON, Markdown and plots."""

import dataclasses
import datetime
import shlex
import sys
from pathlib import Path
from typing import Any

from rlhf_fast.config.arguments import from_dict
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json, write_text
from rlhf_fast.lab.compare.cells import Cell, cells_of
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.figures import figures_of, median_over_seeds, time_model
from rlhf_fast.lab.compare.plots import write_plots
from rlhf_fast.lab.compare.processes import run_cell
from rlhf_fast.lab.compare.start import prepare
from rlhf_fast.lab.compare.tables import markdown, show
from rlhf_fast.lm import manifest
from rlhf_fast.lm.trust import trusts_as_asked
from rlhf_fast.methods import METHODS, load
from rlhf_fast.plan.command import largest_batch, plan_of
from rlhf_fast.plan.gpus import parse_memory
from rlhf_fast.plan.phases import Planner
from rlhf_fast.ranks import current
from rlhf_fast.report.reuse import not_resumable
from rlhf_fast.training import checkpoint
from rlhf_fast.training.lock import writes_alone
from rlhf_fast.training.made import difference, made_with


@writes_alone("output_dir")
@trusts_as_asked
def run(config: CompareConfig) -> None:
    """Everything goes to `config.output_dir`: compare.json, compare.md, plots/ and a folder per run.

    In several processes every cell runs over all of them.
    """
    out, ranks = Path(config.output_dir), current()
    if config.memory and ranks.size > 1:
        raise ValueError(f"memory: expected none in {ranks.size} processes, got {config.memory}")
    start = prepare(config)
    cells = cells_of(config, start)
    memory = parse_memory(config.memory) if config.memory else None
    for number, cell in enumerate(cells, 1):
        changed = ""
        if config.resume:  # the first process alone changes what is there
            changed = ranks.gather(_changed(cell, out / cell.key, memory) if ranks.first else None)[0]
        if changed is not None:
            why = f": made anew, because {changed}" if changed else ""
            print(f"[{number}/{len(cells)}] {cell.name}, seed {cell.seed}{why}", flush=True)
            if changed and ranks.first:
                checkpoint.clear(out / cell.key)
            run_cell(cell, out / cell.key, memory, config.resume and not changed)
    if not ranks.first:
        return
    results = [figures_of(cell, out / cell.key) for cell in cells]
    rows = median_over_seeds(results)
    if memory:
        by_name = {cell.name: cell for cell in cells}
        for row in rows:
            row["largest_batch"] = _largest_batch(by_name[row["name"]], memory)
    record = {
        "command": "rlhf-fast " + shlex.join(sys.argv[1:]),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "environment": next((r["environment"] for r in rows if r["ran"]), None),
        "config": vars(config),
        "methods": rows,
        "runs": results,
        "time_model": time_model(rows),
    }
    show(record)
    write_json(out / "compare.json", record)
    plots = write_plots(out / "plots", rows)
    write_text(out / "compare.md", markdown(record, plots))
    print(f"compare: wrote {out / 'compare.md'}")


def _changed(cell: Cell, directory: Path, memory: int | None) -> str | None:
    """Why the run in `directory` cannot be taken or go on: "" where it can go on, None where it has finished."""
    config = _config(cell, directory)
    checkpoint.clean_up(directory)
    if not (directory / "result.json").is_file():
        return not_resumable(dataclasses.replace(config, resume=True)) or ""
    record = read_json(directory / "result.json")
    if record.get("memory") != memory:
        return f"memory is {memory} bytes and was {record.get('memory')}"
    if record["ran"] and (wrong := manifest.damage(directory)):
        return wrong
    return difference(record, made_with(config))


def _config(cell: Cell, directory: Path) -> Any:
    return from_dict(load(METHODS[cell.method].config), cell.options | {"output_dir": str(directory)}, cell.name)


def _largest_batch(cell: Cell, memory: int) -> int:
    return largest_batch(Planner(plan_of(cell.method, _config(cell, Path("unused")))), memory)
