"""Runs the parts of a study in parallel processes: the starts first, then what stands on them.

What finished is not run again, so an interrupted study goes on where it stopped, and studies that share a directory
share their trained models. A directory made with other settings is an error, never reused. What a run prints goes to
log.txt beside its results.
"""

import dataclasses
import importlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast import demo
from rlhf_fast.checkpoint import write_json
from rlhf_fast.config import PipelineConfig
from rlhf_fast.study.config import TrainedStudyConfig
from rlhf_fast.study.methods import Cell, cells_of
from rlhf_fast.study.start import pipeline_of, prepare


class Job(NamedTuple):
    name: str
    log: Path
    function: Callable[[Any], None]  # importable by its name, as the process that runs it is another one
    argument: Any


def train(config: TrainedStudyConfig, wanted: Iterable[tuple[str, float | None]]) -> list[Cell]:
    """Trains what is not there yet of every wanted (method, strength) on every seed; returns the cells, seed by seed.

    Raises ValueError for a directory of other settings, and, after everything else is done, for runs that failed.
    """
    out, shorten = Path(config.out), 10 if config.quick else 1
    starts = [pipeline_of(config.pipeline, out, seed, shorten=shorten) for seed in range(config.seeds)]
    _same_settings(out, {"pipeline": config.pipeline, "quick": config.quick})
    if config.pipeline is None and not (out / "data").is_dir():
        demo.write_data(out / "data", 0, shorten)
    prepared = [Path(start.output_dir) / "start.json" for start in starts]
    jobs = [
        Job(f"SFT, pairs and reward model, seed {start.seed}", path.with_name("log.txt"), _prepare, (start, config))
        for start, path in zip(starts, prepared, strict=True)
        if not path.is_file()
    ]
    run_jobs(jobs, config.workers)
    wanted = list(wanted)
    cells = [cell for start in starts for cell in cells_of(start, wanted)]
    train_cells(cells, config.workers)
    return cells


def train_cells(cells: Sequence[Cell], workers: int) -> None:
    """Trains what is not there yet."""
    missing = [cell for cell in cells if not _is_there(cell)]
    run_jobs([Job(c.name, c.directory / "log.txt", _train, (c.target, c.config)) for c in missing], workers)


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Runs all of them, `workers` at a time, one line each; then raises ValueError if any failed."""
    if not jobs:
        return
    failed = []
    with _pool(workers) as pool:
        began = time.perf_counter()
        futures = {pool.submit(_logged, *job[1:]): job for job in jobs}
        for number, future in enumerate(as_completed(futures), 1):
            job, error = futures[future], future.exception()
            minutes, seconds = divmod(round(time.perf_counter() - began), 60)
            end = "" if error is None else f": FAILED, {type(error).__name__}: {' '.join(str(error).split())}"
            print(f"[{number}/{len(jobs)}] {minutes}:{seconds:02d}  {job.name}{end}", flush=True)
            if error is not None:
                failed.append(job)
    if failed:
        names = "; ".join(job.name for job in failed)
        raise ValueError(f"{len(failed)} of {len(jobs)} runs failed ({names}); the first one's log: {failed[0].log}")


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that share the cores; nothing is waited for where it is left by an exception (an interruption, say)."""
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    pool = ProcessPoolExecutor(workers, context, torch.set_num_threads, (threads,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _logged(log: Path, function: Callable[[Any], None], argument: Any) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, redirect_stdout(file), redirect_stderr(file):
        function(argument)


def _prepare(argument: tuple[PipelineConfig, TrainedStudyConfig]) -> None:
    start, config = argument
    prepare(start, embedded=config.pipeline is None)
    write_json(Path(start.output_dir) / "start.json", dataclasses.asdict(start))


def _train(argument: tuple[str, Any]) -> None:
    target, config = argument
    module, name = target.split(":")
    getattr(importlib.import_module(f"rlhf_fast.{module}"), name)(config)


def _is_there(cell: Cell) -> bool:
    """Whether the cell's run is finished; raises ValueError where it is one of other settings."""
    path = cell.directory / "run.json"
    if not path.is_file():
        return False
    was, now = json.loads(path.read_text())["config"], dataclasses.asdict(cell.config)
    changed = [name for name in now if name != "resume" and was.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise ValueError(
            f"out: {cell.directory} holds a run with {name}={was.get(name)!r} where this study has {now[name]!r}; "
            "name another directory"
        )
    return True


def _same_settings(out: Path, settings: dict[str, Any]) -> None:
    """Notes them in `out`; raises ValueError where it was made with others."""
    path = out / "study.json"
    if path.is_file():
        was = json.loads(path.read_text())
        for name, value in settings.items():
            if was[name] != value:
                raise ValueError(f"{name}: expected {was[name]!r}, as {out} was made with, got {value!r}")
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
