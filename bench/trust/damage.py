"""A checkpoint is damaged, then --resume: one line, or the results of an undamaged run.

Every file of the newest checkpoint is damaged, and the metrics beside it. An edited optimizer state has the right
checksum, as a state of another model has that somebody put there.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from bench.trust import child, mutations
from bench.trust.kind import Case, Kind, Lost, expect
from bench.trust.world import STAGE_TARGETS, World, copy
from rlhf_fast.lm import manifest

Damage = Callable[[Path, Path, Random], None]  # of a file, with the same file of another run


def cases(world: World, target: str) -> Iterator[Case]:
    """Every damage of every file of an interrupted run, then the edited states."""
    run = interrupted(world, target)
    files = [
        path.relative_to(run) for path in sorted(run.rglob("*")) if path.is_file() and not path.name.startswith(".")
    ]
    newest = _newest(run).name
    for file in files:
        if file.parts[0] not in (newest, "metrics.jsonl"):
            continue
        for name, damage in DAMAGES.items():
            if name in _OF_JSON and file.suffix != ".json":
                continue

            def attempt(directory: Path, rng: Random, file: Path = file, damage: Damage = damage) -> None:
                out = copy(run, directory / "out")
                other = interrupted(world, target, "--seed", "1") / file if damage is _swap else file
                damage(out / file, other, rng)
                resumed(world, target, directory)

            yield Case(f"{target}/{name} {str(file).replace('/', ':')}", attempt)
    for name, edit in EDITS.items():

        def edited(directory: Path, rng: Random, edit: Callable[[dict], Any] = edit) -> None:
            out = copy(run, directory / "out")
            state = _newest(out) / "state.pt"
            torch.save(edit(torch.load(state, weights_only=True)), state)
            sign(_newest(out))
            resumed(world, target, directory)

        yield Case(f"{target}/state {name}", edited)

    def wide(directory: Path, rng: Random) -> None:
        out = copy(run, directory / "out")
        source = interrupted(world, target, "--model", str(world.root / "wide_model"))
        shutil.copy(_newest(source) / "state.pt", _newest(out) / "state.pt")
        sign(_newest(out))
        resumed(world, target, directory)

    yield Case(f"{target}/state of a wider model", wide)


def interrupted(world: World, target: str, *more: str) -> Path:
    """The directory of a run that was killed after its last checkpoint; the older one is still there."""
    baseline = world.baseline(target, *more)
    cut = baseline.directory.parent / "interrupted"
    if not cut.exists():
        ledger = (baseline.directory.parent / "ledger").read_text().splitlines()
        renames = [int(line.split()[0]) for line in ledger if re.search(r" rename \S*checkpoint-\d+$", line)]
        saved = [n for n, line in enumerate(ledger, 1) if n in renames and "deleting" not in line]
        written = [n for n in saved if "writing" in ledger[n - 1] or ".new" in ledger[n - 1]] or saved
        out = baseline.directory.parent / "cut" / "out"
        begin = mutations.crash(out, out.parent / "ledger", written[-1] + 1)
        run = world.start(target, out, *more)
        child.run(lambda: (begin(), run())[1], out.parent / "log")
        if not any(out.glob("checkpoint-*")):
            raise Lost(f"the run of {target} that was to be damaged has no checkpoint")
        out.rename(cut)
    return cut


def resumed(world: World, target: str, directory: Path) -> None:
    """The resumed run ends with one line, or with the results of an undamaged run."""
    out, wanted = directory / "out", world.baseline(target).directory
    newest = _newest(out).name
    ended = child.run(world.start(target, out, resume=True), directory / "log", 60)
    expect(ended.code >= 0, f"expected an error or the right results, got death by signal {-ended.code}: {ended.last}")
    if ended.code:
        clear = "Traceback" not in ended.output and ended.last.startswith("rlhf-fast: ")
        expect(clear, f"expected one line, got exit code {ended.code}: {ended.output[-300:]!r}")
        return
    try:
        if (wanted / newest).exists():  # the damaged one may stay as it is, because a finished run has no use for it
            shutil.rmtree(out / newest, ignore_errors=True)
            shutil.copytree(wanted / newest, out / newest)
        world.must_equal(out, wanted)
    except Lost as lost:
        raise Lost(f"another result in silence, exit code 0: {lost}") from lost


def _newest(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def sign(checkpoint: Path) -> None:
    """Writes the manifest anew, with the checksums of what is there now."""
    manifest.write(checkpoint, manifest.of_files(checkpoint))


def _flip(file: Path, other: Path, rng: Random) -> None:
    content = bytearray(file.read_bytes())
    place = rng.randrange(len(content)) if rng.random() < 0.5 else rng.randrange(len(content) // 2, len(content))
    content[place] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def _truncate(file: Path, other: Path, rng: Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: rng.randrange(1, len(content))])


def _swap(file: Path, other: Path, rng: Random) -> None:
    if other.exists():
        shutil.copy(other, file)


def _garbage(file: Path, other: Path, rng: Random) -> None:
    file.write_bytes(rng.randbytes(file.stat().st_size))


def _json(content: Any) -> Damage:
    return lambda file, other, rng: file.write_text(json.dumps(content) + "\n") and None


DAMAGES: dict[str, Damage] = {
    "flip": _flip,
    "flip again": _flip,
    "truncate": _truncate,
    "empty": lambda file, other, rng: file.write_bytes(b"") and None,
    "remove": lambda file, other, rng: file.unlink(),
    "garbage": _garbage,
    "swap": _swap,
    "object": _json({}),
    "list": _json([]),
    "null": _json(None),
}
_OF_JSON = {"object", "list", "null"}


def _moments(state: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The state with every matrix of the optimizers changed."""
    if isinstance(state, dict):
        return {key: _moments(value, change) for key, value in state.items()}
    if isinstance(state, list):
        return [_moments(value, change) for value in state]
    return change(state) if isinstance(state, torch.Tensor) and state.dim() == 2 else state


def _swapped(state: dict) -> dict:
    """The first two states of different shapes change places, in every optimizer."""
    for value in state.values():
        if isinstance(value, dict):
            _swapped(value)
            if isinstance(slots := value.get("state"), dict) and len(slots) > 1:
                keys = sorted(
                    slots, key=lambda key: str({n: x.shape for n, x in slots[key].items() if hasattr(x, "shape")})
                )
                slots[keys[0]], slots[keys[-1]] = slots[keys[-1]], slots[keys[0]]
    return state


def _without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


EDITS: dict[str, Callable[[dict], Any]] = {
    "transposed": lambda state: _moments(state, lambda x: x.t().contiguous()),
    "fp16": lambda state: _moments(state, lambda x: x.half()),
    "integers": lambda state: _moments(state, lambda x: x.long()),
    "narrow": lambda state: _moments(state, lambda x: x[:, :1].clone()),
    "flat": lambda state: _moments(state, lambda x: x.flatten()),
    "empty moments": lambda state: _moments(state, lambda x: x[:0]),
    "swapped": _swapped,
    "without step": lambda state: _without(state, "step"),
    "step -1": lambda state: {**state, "step": -1},
    "step 1e9": lambda state: {**state, "step": 10**9},
    "step text": lambda state: {**state, "step": "3"},
    "a list": lambda state: [],
    "empty": lambda state: {},
    "a tensor": lambda state: torch.zeros(3),
}
KIND = Kind(
    "flipped bits, truncated, removed and swapped files, edited optimizer states, then --resume",
    STAGE_TARGETS,
    ("sft", "ppo"),
    cases,
)
