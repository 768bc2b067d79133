"""Two runs at once in one output_dir: one of them says who writes there, and the other's results are whole.

`same` resumes one interrupted run twice, as a scheduler does that restarts what still runs. `other` starts runs of two
seeds. `handed over` kills the first run while the second one waits for it.
"""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from bench.trust import child, mutations
from bench.trust.child import Child
from bench.trust.equal import differences
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import TARGETS, World

TRIES = 10  # of each way, by target


def cases(world: World, target: str) -> Iterator[Case]:
    """TRIES of each way to be two."""
    world.baseline(target)
    for name, way in (("same", same), ("other", other), ("handed over", handed_over)):
        for number in range(TRIES):
            yield Case(f"{target}/{name} {number}", lambda directory, rng, way=way: way(world, target, directory, rng))


def same(world: World, target: str, directory: Path, rng: Random) -> None:
    """An interrupted run is resumed twice at once."""
    out, baseline = directory / "out", world.baseline(target)
    begin = mutations.crash(out, directory / "ledger", rng.randint(baseline.mutations // 2, baseline.mutations))
    run = world.start(target, out)
    child.run(lambda: (begin(), run())[1], directory / "log_first")
    ended = _both(world, target, directory, rng, ((), ()), resume=True)
    _told(ended)
    expect(ended[0].code == 0 or ended[1].code == 0, f"expected one run to finish, got {_codes(ended)}")
    world.must_equal(out, baseline.directory)


def other(world: World, target: str, directory: Path, rng: Random) -> None:
    """Runs of two seeds start at once."""
    out, seeds = directory / "out", ((), ("--seed", "1"))
    if target == "exact study":
        seeds = ((), ("--world-seed", "1"))
    elif target in ("compare", "study"):
        seeds = ((), ())
    ended = _both(world, target, directory, rng, seeds, resume=False)
    _told(ended)
    finished = [world.baseline(target, *more).directory for more, one in zip(seeds, ended, strict=True) if not one.code]
    expect(bool(finished), f"expected one run to finish, got {_codes(ended)}")
    found = [differences(out, wanted) for wanted in finished]  # the later run replaces what a finished one has left
    expect(not all(found), f"expected the results of one run, but {'; '.join(found[0])}")


def handed_over(world: World, target: str, directory: Path, rng: Random) -> None:
    """The first run dies while the second one looks; a third one must find the directory free."""
    out, baseline = directory / "out", world.baseline(target)
    first = Child(world.start(target, out), directory / "log0")
    first.ended(rng.uniform(0.1, 0.9) * baseline.seconds)
    second = Child(world.start(target, out, resume=True), directory / "log1")
    second.ended(rng.uniform(0.0, 0.3) * baseline.seconds)
    first.signal(signal.SIGKILL)
    first.wait()
    ended = second.wait()
    _told((ended,))
    third = child.run(world.start(target, out, resume=True), directory / "log2")
    expect(third.code == 0, f"expected a third run to finish, got exit code {third.code}: {third.last}")
    world.must_equal(out, baseline.directory)


def _both(world: World, target: str, directory: Path, rng: Random, more, *, resume: bool) -> list[child.Ended]:
    first = Child(world.start(target, directory / "out", *more[0], resume=resume), directory / "log0")
    time.sleep(rng.choice((0.0, rng.uniform(0, 0.5) * world.baseline(target).seconds)))
    second = Child(world.start(target, directory / "out", *more[1], resume=resume), directory / "log1")
    return [first.wait(), second.wait()]


def _told(ended) -> None:
    """Raises Lost where a run that did not finish said anything but one line about output_dir."""
    for one in ended:
        clear = one.last.startswith("rlhf-fast: out") and "Traceback" not in one.output
        if one.code and not clear:
            raise Lost(f"expected one line about output_dir, got exit code {one.code}: {one.last}")


def _codes(ended) -> str:
    return " and ".join(f"exit code {one.code} ({one.last})" for one in ended)


KIND = Kind("two runs at once in one output_dir", TARGETS[:-1], ("sft", "remax", "pairs", "exact study"), cases)
