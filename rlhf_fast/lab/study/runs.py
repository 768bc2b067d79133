"""Runs the parts of a study in parallel processes: the starts first, then the runs that begin from them.

Finished runs are not run again. An interrupted study therefore goes on where it stopped, and studies that share a
directory share their trained models. A directory made with other settings is an error, never reused. The output of a
run goes to log.txt beside its results.
"""

import dataclasses
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf_fast.config import PipelineConfig
from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json
from rlhf_fast.lab import demo
from rlhf_fast.lab.study.config import MethodsStudyConfig, TrainedStudyConfig
from rlhf_fast.lab.study.methods import Cell, Strengths, cells_of
from rlhf_fast.lab.study.start import pipeline_of, prepare
from rlhf_fast.lm import manifest
from rlhf_fast.methods import load
from rlhf_fast.report import pipeline
from rlhf_fast.training import checkpoint, ending
from rlhf_fast.training.console import Lasting
from rlhf_fast.training.fingerprint import fingerprints
from rlhf_fast.training.made import FREE


class Job(NamedTuple):
    """One part of a study, run in a process of its own."""

    name: str
    log: Path
    function: Callable[[Any], None]  # importable by its name, because another process runs it
    argument: Any


def train(config: MethodsStudyConfig, strengths: Strengths) -> list[Cell]:
    """Trains what is not there yet of `config.methods` at these strengths on every seed; the cells, seed by seed.

    Raises ValueError for a directory of other settings, and, after everything else is done, for runs that failed.
    """
    for name in config.methods:
        if name not in strengths:
            raise ValueError(f"methods: expected some of {', '.join(strengths)}, got {name!r}")
    wanted = {name: strengths[name] for name in config.methods or strengths}
    cells = [cell for start in prepare_starts(config) for cell in cells_of(start, wanted)]
    train_cells(cells, config.workers)
    return cells


def prepare_starts(config: TrainedStudyConfig) -> list[PipelineConfig]:
    """Makes what is not there yet of every seed's SFT model, pairs and reward model; returns the seeds' pipelines.

    Raises ValueError as `train` does.
    """
    out, shorten = Path(config.out), 10 if config.quick else 1
    starts = [pipeline_of(config.pipeline, out, seed, shorten=shorten) for seed in range(config.seeds)]
    if config.pipeline is None:
        demo.write_data(out / "data", 0, shorten)  # the same each time, so that runs can be reused
    missing = [start for start in starts if not is_made_with(_note(start), _settings(start), _read_by(start))]
    run_jobs(
        [
            Job(f"SFT, pairs and reward model, seed {s.seed}", _note(s).with_name("log.txt"), _prepare, (s, config))
            for s in missing
        ],
        config.workers,
    )
    return starts


def train_cells(cells: Sequence[Cell], workers: int) -> None:
    """Trains what is not there yet."""
    missing = [
        cell
        for cell in cells
        if not is_made_with(cell.directory / "run.json", dataclasses.asdict(cell.config), fingerprints(cell.config))
    ]
    run_jobs([Job(c.name, c.directory / "log.txt", _train, (c.target, c.config)) for c in missing], workers)


def run_jobs(jobs: Sequence[Job], workers: int) -> None:
    """Runs all of them, `workers` at a time, one line each; then raises ValueError if any failed."""
    if not jobs:
        return
    failed = []
    with _pool(workers) as pool:
        began = time.perf_counter()
        # The processes start here. A Ctrl-C waits until they are in a job, because in their imports it is a traceback.
        with _interrupts(signal.SIG_BLOCK, signal.SIG_UNBLOCK):
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
    """Processes that share the cores. An exception leaves without waiting for them, and a signal goes on to them."""
    threads = max(1, torch.get_num_threads() // workers)
    context = multiprocessing.get_context("spawn")  # a forked copy of a process with threads may hang
    pool = ProcessPoolExecutor(workers, context, _begin, (threads,))
    try:
        yield pool
    except BaseException as error:
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, KeyboardInterrupt | ending.Ended):
            ending.end_children(getattr(error, "signum", signal.SIGINT))
        raise
    pool.shutdown()


@contextmanager
def _interrupts(inside: int, after: int) -> Iterator[None]:
    """Blocks or unblocks SIGINT, inside and after. A process begins as its parent was when it started."""
    signal.pthread_sigmask(inside, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(after, {signal.SIGINT})


def _begin(threads: int) -> None:
    """In a new process: take its share of the cores, and end when the process that started it ends."""
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a process of the pool has one
    parent.join()
    os._exit(1)


def _logged(log: Path, function: Callable[[Any], None], argument: Any) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        lasting = Lasting(lambda: file)
        with redirect_stdout(lasting), redirect_stderr(lasting), ending.signals():
            try:
                with _interrupts(signal.SIG_UNBLOCK, signal.SIG_BLOCK):
                    function(argument)
            except (KeyboardInterrupt, ending.Ended) as error:
                print(error, flush=True)
                os._exit(getattr(error, "code", 130))  # else the pool would give this process another job


def _prepare(argument: tuple[PipelineConfig, TrainedStudyConfig]) -> None:
    start, config = argument
    prepare(start, embedded=config.pipeline is None)
    write_json(_note(start), {"config": _settings(start), "made_of": _read_by(start)})


def _note(start: PipelineConfig) -> Path:
    """Written when the start is complete."""
    return Path(start.output_dir) / "start.json"


def _settings(start: PipelineConfig) -> dict[str, Any]:
    """What the stages before the methods depend on."""
    return {name: getattr(start, name) for name in ("model", "seed", *pipeline.BEFORE_METHODS)}


def _read_by(start: PipelineConfig) -> dict[str, Any]:
    """Fingerprints of the data and models that these stages read, of those that no stage makes."""
    stages = {name: stage for name, stage in pipeline.make_plan(start).items() if name in pipeline.BEFORE_METHODS}
    own = Path(start.output_dir)
    return {
        f"{name}.{field}": value
        for name, stage in stages.items()
        for field, value in fingerprints(stage).items()
        if not Path(str(getattr(stage, field))).is_relative_to(own)
    }


def _train(argument: tuple[str, Any]) -> None:
    target, config = argument
    load(target)(config)


def is_made_with(path: Path, config: dict[str, Any], made_of: dict[str, Any]) -> bool:
    """Whether the run that leaves this file is finished; raises ValueError where it had another config or other data.

    made_of: fingerprints of what the run reads, which count in place of paths.
    """
    checkpoint.clean_up(path.parent)
    record = checkpoint.finished(path.parent) if path.name == checkpoint.FINISHED else None
    if record is None and (path.name == checkpoint.FINISHED or not path.is_file()):
        return False
    if record is not None and manifest.read(path.parent) and (wrong := manifest.damage(path.parent)):
        print(f"{path.parent}: {wrong}; it is made anew", flush=True)
        return False
    record = record or read_json(path)
    was, now = record["config"], json.loads(json.dumps(config))
    for name in now:
        if name not in FREE and name not in made_of and was.get(name) != now[name]:
            raise ValueError(
                f"out: {path.parent} was made with {name}={was.get(name)!r}, and this study has {now[name]!r}; "
                "name another directory"
            )
    for name, value in made_of.items():
        if record.get("made_of", {}).get(name) != value:
            raise ValueError(f"out: {path.parent} was made with another content of {name}; name another directory")
    return True
