"""One process of a contender: stages' `train`, as a user calls it, with turns or with its traffic counted.

    python -m bench.ranks.process SPEC.json ...

The first process of a contender speaks JSON lines to whoever started it. With `turn` in a spec it waits, after `warmup`
steps, for a line before each turn of so many steps, and reports the turn's seconds; the other processes wait for the
first process. With `count` in a spec it reports the collectives of that step. It says when a stage is done.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.ranks.formula import Sizes, sizes_of
from bench.ranks.traffic import Traffic
from rlhf_fast.methods import STAGES, load
from rlhf_fast.ranks import Ranks, current
from rlhf_fast.rollout import sampler
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.run import Run

DECODING = "decoding"


class Speaker:
    """JSON lines to standard output, which what the libraries print does not reach."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        if current().first:
            print(json.dumps(facts), file=self._out, flush=True)


class Turns(Listener):
    """Takes `rounds` turns of `turn` steps with other contenders, and waits once more before the run ends."""

    def __init__(self, speaker: Speaker, warmup: int, turn: int, rounds: int) -> None:
        self.speaker, self.warmup, self.turn, self.last = speaker, warmup, turn, turn * rounds

    def log(self, step: int, row: dict[str, Any]) -> None:
        done = step - self.warmup
        if done == 0:
            self.speaker.say(ready=True)
            self._wait()
        elif 0 < done <= self.last and done % self.turn == 0:
            used = sum(current().gather(time.process_time() - self._used))
            self.speaker.say(seconds=time.perf_counter() - self._begun, cpu_seconds=used)
            self._wait()

    def _wait(self) -> None:
        if current().first:
            sys.stdin.readline()
        current().wait()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self._begun, self._used = time.perf_counter(), time.process_time()


class Counter(Listener):
    """Reports the collectives of step `step`, above 1, and the sizes of the models that they belong to.

    Only that step is watched, because every operation is slower then.
    """

    def __init__(self, speaker: Speaker, traffic: Traffic, step: int) -> None:
        self.speaker, self.traffic, self.step, self._watching = speaker, traffic, step, ExitStack()

    def begin(self, run: Run) -> None:
        phase, size = run.meter.phase, current().size

        @contextmanager
        def counted(name: str) -> Iterator[None]:
            with self.traffic.phase(name), phase(name):
                yield

        run.meter.phase = counted
        trained = {role: sizes_of(learner.model, size) for role, learner in run.learners.items()}
        self.sizes: dict[str, Sizes] = {
            **trained,
            **{role: sizes_of(model, size) for role, model in run.frozen.items()},
        }

    def log(self, step: int, row: dict[str, Any]) -> None:
        if step == self.step - 1:
            self._watching.enter_context(watched(self.traffic))
        elif step == self.step:
            self._watching.close()
            sizes = {role: size._asdict() for role, size in self.sizes.items()}
            self.speaker.say(counts=self.traffic.take(), sizes=sizes)


@contextmanager
def watched(traffic: Traffic) -> Iterator[None]:
    """Inside, collectives in a decode are of the phase `decoding`, and exchanges of numbers are known as such."""
    decode, gather = sampler.generate, Ranks.gather

    def decoding(*arguments: Any, **options: Any) -> Any:
        with traffic.phase(DECODING):
            return decode(*arguments, **options)

    def exchange(self: Ranks, value: Any) -> list[Any]:
        with traffic.numbers():
            return gather(self, value)

    sampler.generate, Ranks.gather = decoding, exchange
    try:
        with traffic:
            yield
    finally:
        sampler.generate, Ranks.gather = decode, gather


def main() -> None:
    """Trains as the specs on the command line say, one after the other."""
    speaker = Speaker()
    for path in sys.argv[1:]:
        wanted = json.loads(Path(path).read_text())
        row = STAGES[wanted["stage"]]
        config, train = load(row.config)(**wanted["options"]), load(row.train)
        if "count" in wanted:
            train(config, listeners=[Counter(speaker, Traffic(), wanted["count"])])
        else:
            train(config, listeners=[Turns(speaker, wanted["warmup"], wanted["turn"], wanted["rounds"])])
        speaker.say(done=True)


if __name__ == "__main__":
    main()
