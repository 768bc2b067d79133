"""SIGKILL at a mutation of the file system, then --resume: the results of an uninterrupted run, and nothing left over.

sft/17 dies before mutation 17 and is resumed; sft/17+5 dies again before mutation 5 of the resumed run. A target named
`over sft` starts in the directory of a finished run of another seed. Where the kill comes before that run is touched,
--resume must refuse that run's checkpoint, and that run's results must be whole.
"""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

from bench.trust import child, mutations
from bench.trust.kind import Case, Kind, expect
from bench.trust.world import STAGE_TARGETS, TARGETS, World, copy

OVER = "over "
REFUSED = "as in the run to resume"
_TWICE = 20  # cases of two crashes, by target


def cases(world: World, target: str) -> Iterator[Case]:
    """Each mutation of the target, then some pairs of mutations."""
    name = target.removeprefix(OVER)
    found = world.baseline(name).mutations
    older = world.baseline(name, "--seed", "1").directory if name != target else None

    def case(*places: int) -> Case:
        def run(directory: Path, rng: Random) -> None:
            crashed(world, name, directory, places, older)

        return Case(f"{target}/{'+'.join(map(str, places))}", run)

    yield from (case(place) for place in range(1, found + 1))
    rng = Random(target)
    yield from (case(rng.randint(1, found), rng.randint(1, found)) for _ in range(_TWICE))


def crashed(world: World, target: str, directory: Path, places: tuple[int, ...], older: Path | None = None) -> None:
    """Kills the target at each of the places, one run after the other; the run after the last must make it whole."""
    out, wanted = directory / "out", world.baseline(target).directory
    if older is not None:
        copy(older, out)
    for number, place in enumerate(places):
        begin = mutations.crash(out, directory / f"ledger{number}", place)
        run = world.start(target, out, resume=number > 0)
        ended = child.run(lambda begin=begin, run=run: (begin(), run())[1], directory / f"log{number}")
        if ended.code == 0:  # it has fewer mutations
            return world.must_equal(out, wanted)
        said = f"expected the kill or a finished run, got exit code {ended.code}: {ended.last}"
        expect(ended.code == -signal.SIGKILL, said)
    ended = child.run(world.start(target, out, resume=True), directory / "log_resumed")
    if older is not None and ended.code == 1 and REFUSED in ended.last:
        return still_there(world, out, older)
    expect(ended.code == 0, f"expected the resumed run to finish, got exit code {ended.code}: {ended.last}")
    world.must_equal(out, wanted)


def still_there(world: World, out: Path, older: Path) -> None:
    """Raises Lost unless the older run's results are whole. Its checkpoints may be gone, because it has finished."""
    kept = copy(older, out.with_name("older"))
    for place in (kept, out):
        for checkpoint in place.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
    world.must_equal(out, kept)


KIND = Kind(
    "SIGKILL at every change of the file system, then --resume",
    (*TARGETS, *(OVER + stage for stage in STAGE_TARGETS), OVER + "pipeline"),
    ("sft", "remax", "ppo", "over sft", "pairs", "reward", "pipeline"),
    cases,
)
