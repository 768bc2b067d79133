"""The steps of a stage's own `train`: timed, profiled, and once more on one thread."""

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from bench.measure import quantiles
from bench.steps import products, trace
from bench.steps.products import Counts
from bench.steps.watch import Profile
from rlhf_fast.methods import STAGES, load
from rlhf_fast.training.listeners import Listener, Running

ADAMW = "Optimizer.step"  # the profiler's name of an optimizer's step
WARM_UP, TIMED, PROFILED, ONE_THREAD = "warm-up", "timed", "profiled", "one thread"


def kinds(rounds: int) -> list[str]:
    """What each step of a run is for."""
    return [WARM_UP, *[TIMED] * rounds, PROFILED, ONE_THREAD]


class Steps(Listener):
    """Takes the clocks of every step, and the profile of one. clocks: kind -> (seconds, CPU seconds) of its steps."""

    def __init__(self, rounds: int, path: Path) -> None:
        self.kinds, self.clocks = kinds(rounds), dict[str, list[tuple[float, float]]]()
        self.threads, self._profile = torch.get_num_threads(), Profile(path)
        self._labels = ExitStack()

    def begin(self, run: Running) -> None:
        self.learners = run.learners
        run.meter.steps = 2  # the first two steps measure memory, which hands memory back and takes it anew

    def log(self, step: int, row: dict[str, Any]) -> None:
        clocks, cpu_clocks = time.perf_counter(), time.process_time()
        if step > 1:
            taken = clocks - self._begun[0], cpu_clocks - self._begun[1]
            self.clocks.setdefault(self.kinds[step - 1], []).append(taken)
        if self.kinds[step - 1] == PROFILED:
            self.window, self.calls = self._profile.end(), [*self._profile.calls]
            self._labels.close()
        kind = self.kinds[step] if step < len(self.kinds) else None
        if kind == PROFILED:
            self._labels.enter_context(self._profile.labelled())
            self._profile.begin()
        elif kind == ONE_THREAD:
            torch.set_num_threads(1)
        self._begun = time.perf_counter(), time.process_time()

    def end(self) -> None:
        self._labels.close()
        torch.set_num_threads(self.threads)


def measure(stage: str, options: dict[str, Any], rounds: int, directory: Path) -> tuple[dict[str, Any], Counts]:
    """Clocks and profile of a stage's steps, ready for JSON, and the matmuls of a step. options: of the stage."""
    row, steps = STAGES[stage], Steps(rounds, directory / "trace.json")
    load(row.train)(load(row.config)(output_dir=str(directory / "run"), **options), listeners=[steps])
    moved = sum(event.name.startswith(ADAMW) for event, _ in trace.walk(steps.window)) // len(steps.learners)
    weights = moved * sum(p.numel() for learner in steps.learners.values() for p in learner.parameters)
    result = described(steps.clocks, steps.window, steps.threads)
    result["optimizer"] = {"weights": weights, "seconds": trace.named(steps.window, ADAMW)}
    return result, products.count(steps.window, steps.calls)


def described(clocks: dict[str, list[tuple[float, float]]], window: trace.Event, threads: int) -> dict[str, Any]:
    """What JSON keeps of the clocks and of the profiled window."""
    ((seconds, cpu_seconds),) = clocks[PROFILED]
    return {
        "rounds": len(clocks[TIMED]),
        "seconds": quantiles([wall for wall, _ in clocks[TIMED]]),
        "cpu_seconds": quantiles([cpu for _, cpu in clocks[TIMED]]),
        "one_thread_cpu_seconds": clocks[ONE_THREAD][0][1],
        "profile": {
            "seconds": window.seconds,
            "groups": trace.seconds(window),
            "threads": threads,
            "cpu_seconds": cpu_seconds,
            "waiting": threads * seconds - cpu_seconds,
        },
    }
