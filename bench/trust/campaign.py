"""The order of the tries, the time that each kind gets, and what is kept of a lost try."""

import dataclasses
import itertools
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.trust.kind import Case, Kind, Lost
from bench.trust.world import HEAVY, World


@dataclasses.dataclass
class Tally:
    """What became of a kind's tries."""

    tries: int = 0
    seconds: float = 0.0
    losses: list[dict[str, str]] = dataclasses.field(default_factory=list)
    targets: dict[str, int] = dataclasses.field(default_factory=dict)  # tries by target


def conduct(
    kinds: Mapping[str, Kind],
    root: Path,
    *,
    seed: int,
    seconds: float | None = None,
    quick: bool = False,
    case: str | None = None,
    tries: int | None = None,
    keep: Path | None = None,
) -> dict[str, Tally]:
    """Tries everything, or as much as fits into `seconds`, and returns what became of it by kind.

    case: the name of the only case. tries: at most so many of each kind, drawn at random. keep: the directory for the
    files of lost tries.
    A kind that takes less than its share of the time leaves the rest to the kinds after it.
    """
    began, tallies = time.monotonic(), {}
    world = World(root / "world")
    for place, (name, kind) in enumerate(kinds.items()):
        ends = None
        if seconds is not None:
            left = began + seconds - time.monotonic()
            ends = time.monotonic() + left / (len(kinds) - place)
        tallies[name] = tally = Tally()
        if case is not None:
            wanted = case.rpartition("/")[0]
            cases: Iterable[Case] = (one for one in kind.cases(world, wanted) if one.name == case)
        else:
            targets = list(kind.quick if quick else kind.targets)
            rng = random.Random(f"{seed}/{name}")
            if ends is None and tries is None:
                cases = (one for target in targets for one in _of_target(kind, target, world, tally))
            else:
                cases = _drawn(kind, targets, world, tally, rng, shuffled=not quick)
        start = time.monotonic()
        for one in cases:
            if ends is not None and tally.tries and time.monotonic() > ends:
                break
            if tries is not None and tally.tries >= tries:
                break
            _try(name, one, root, tally, seed=seed, keep=keep)
        tally.seconds = time.monotonic() - start
        _say(f"{name}: {tally.tries} tries, {len(tally.losses)} lost, {tally.seconds:.0f} s")
    return tallies


def _of_target(kind: Kind, target: str, world: World, tally: Tally) -> Iterator[Case]:
    """The cases of a target. A target that cannot even run without harm is lost."""
    try:
        yield from kind.cases(world, target)
    except Lost as lost:
        tally.tries += 1
        tally.losses.append({"case": f"{target}/uninterrupted", "said": str(lost), "command": ""})


_TURN = 3  # tries of a target in a quick campaign before the next one, whose uninterrupted run takes time


def _drawn(
    kind: Kind, targets: list[str], world: World, tally: Tally, rng: random.Random, *, shuffled: bool
) -> Iterator[Case]:
    """The targets by turns, and of each a case at random."""
    if shuffled:
        rng.shuffle(targets)
        targets.sort(key=HEAVY.__contains__)  # a short campaign does not get to them
    left: dict[str, list[Case]] = {}
    turn = 1 if shuffled else _TURN
    for target in itertools.cycle(targets):
        if target not in left:
            left[target] = list(_of_target(kind, target, world, tally))
            rng.shuffle(left[target])
        for _ in range(min(turn, len(left[target]))):
            yield left[target].pop()
        if len(left) == len(targets) and not any(left.values()):
            return


def _try(kind: str, case: Case, root: Path, tally: Tally, *, seed: int, keep: Path | None) -> None:
    directory = Path(tempfile.mkdtemp(prefix=f"{kind}-", dir=root))
    target = case.name.rpartition("/")[0]
    tally.tries += 1
    tally.targets[target] = tally.targets.get(target, 0) + 1
    try:
        case.run(directory, random.Random(f"{seed}/{kind}/{case.name}"))
    except Lost as lost:
        said, command = str(lost), f'python -m bench trust --only {kind} --case "{case.name}" --seed {seed} --keep DIR'
        loss = {"case": case.name, "said": said, "command": command}
        if keep is not None:
            kept = keep / f"{kind}-{case.name.replace('/', '-').replace(' ', '_')}"
            shutil.rmtree(kept, ignore_errors=True)
            shutil.copytree(directory, kept, symlinks=True, ignore_dangling_symlinks=True)
            (kept / "lost.txt").write_text(f"{command}\n{said}\n")
            loss["kept"] = str(kept)
        tally.losses.append(loss)
        _say(f"LOST {kind} {case.name}: {said}")
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def record(tallies: Mapping[str, Tally]) -> dict[str, Any]:
    """What JSON keeps of a campaign."""
    return {name: dataclasses.asdict(tally) for name, tally in tallies.items()}


def rows(kinds: Mapping[str, Kind], tallies: Mapping[str, Tally]) -> list[dict[str, Any]]:
    """The table: a row for each kind and one for all."""
    table = [
        {
            "kind": name,
            "what": kinds[name].help,
            "tries": tally.tries,
            "survived": tally.tries - len(tally.losses),
            "lost": len(tally.losses),
        }
        for name, tally in tallies.items()
    ]
    return [
        *table,
        {"kind": "all", "what": "", **{k: sum(row[k] for row in table) for k in ("tries", "survived", "lost")}},
    ]
