"""Signals at random moments, one to three runs in a row, to the process or to its group; then --resume.

SIGKILL has no say. After SIGTERM, SIGHUP or SIGINT a run that has begun must end in 30 s with the exit code of the
signal and a line that says how to go on.
"""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

from bench.trust import child
from bench.trust.child import Child
from bench.trust.kind import Case, Kind, expect
from bench.trust.world import TARGETS, World

_NOTHING = "nothing is saved"
_NO_STEP = "this command took no step"  # what an earlier one has saved stays
TRIES = 40  # by target
GRACE = 30.0  # seconds from a signal to the end
_KINDS = (signal.SIGKILL,) * 3 + (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


def cases(world: World, target: str) -> Iterator[Case]:
    """TRIES random tries."""
    seconds = world.baseline(target).seconds
    for number in range(TRIES):
        yield Case(f"{target}/{number}", lambda directory, rng: killed(world, target, directory, rng, seconds))


def killed(world: World, target: str, directory: Path, rng: Random, seconds: float) -> None:
    """One to three signals, then a run that must make everything whole."""
    out = directory / "out"
    for number in range(rng.choice((1, 1, 2, 3))):
        sent, group = rng.choice(_KINDS), rng.random() < 0.5
        running = Child(world.start(target, out, resume=number > 0), directory / f"log{number}")
        if running.ended(rng.uniform(0.05, 1.05) * seconds):
            expect((ended := running.wait()).code == 0, f"expected exit code 0, got {ended.code}: {ended.last}")
            return world.must_equal(out, world.baseline(target).directory)
        begun = _holds_a_lock(running.pid, out)
        running.signal(sent, group=group)
        ended = running.wait(GRACE)
        saved = any(out.glob("checkpoint-*"))
        if sent == signal.SIGKILL:
            expect(ended.code in (0, -sent), f"expected death by SIGKILL, got exit code {ended.code}: {ended.last}")
        elif begun:
            name = signal.Signals(sent).name
            said = f"expected exit code {128 + sent} after {name}, got {ended.code}: {ended.last}"
            expect(ended.code in (0, 128 + sent), said)
            expect("Traceback" not in ended.output, f"expected one line after {name}, got a traceback: {ended.last}")
            if ended.code and target in STAGE_RUNS:
                told = "--resume" in ended.output if saved else _NOTHING in ended.last
                told = told or _NO_STEP in ended.last or "it was finished" in ended.last
                expect(told, f"expected what is saved ({saved}) after {name}, got {ended.last}")
    ended = child.run(world.start(target, out, resume=True), directory / "log_resumed")
    expect(ended.code == 0, f"expected the resumed run to finish, got exit code {ended.code}: {ended.last}")
    world.must_equal(out, world.baseline(target).directory)


def _holds_a_lock(process: int, out: Path) -> bool:
    """Whether the process has begun to write to `out`, and no longer loads Python's modules."""
    for lock in out.rglob(".rlhf_fast*lock*"):
        with suppress(OSError):  # it is gone
            if lock.read_text(errors="replace").startswith(f"{process} "):
                return True
    return False


STAGE_RUNS = set(TARGETS[1:-5])  # a training stage alone writes the checkpoint that the line is about
KIND = Kind(
    "signals at random moments, to the process or its group, then --resume",
    TARGETS,
    ("sft", "ppo", "remax", "dpo", "pairs"),
    cases,
)
