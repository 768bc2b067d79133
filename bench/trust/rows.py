"""Malformed data files: one line that names the file, and the results of an earlier run in the directory stay.

The named faults must be refused. A file with random bytes in it may also happen to be good; then the run may finish.
"""

import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from bench.trust import child
from bench.trust.kind import Case, Kind, expect
from bench.trust.world import STAGE_TARGETS, World, copy
from rlhf_fast.methods import STAGES

RANDOM = 20  # files with random bytes, by target
_FILES = {"sft": "sft", "preference": "pairs", "prompt": "prompts", "unpaired": "unpaired"}


def cases(world: World, target: str) -> Iterator[Case]:
    """Every named fault, then RANDOM files with random bytes."""
    kind = STAGES[target].rows
    good = (world.root / f"{_FILES[kind]}.jsonl").read_bytes()
    for name, fault in FAULTS.items():
        suffix, content = fault(good, kind)
        if content is None:
            continue

        def attempt(directory: Path, rng: Random, suffix: str = suffix, content: bytes = content) -> None:
            refused(world, target, directory, suffix, content, must=True)

        yield Case(f"{target}/{name}", attempt)

    def fuzzed(directory: Path, rng: Random) -> None:
        content = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(content))
            content[place : place + rng.choice((0, 1, 1, 5))] = rng.randbytes(rng.choice((0, 1, 1, 7)))
        refused(world, target, directory, ".jsonl", bytes(content), must=False)

    yield from (Case(f"{target}/random {number}", fuzzed) for number in range(RANDOM))


def refused(world: World, target: str, directory: Path, suffix: str, content: bytes, *, must: bool) -> None:
    """Runs over a finished run with these rows. must: a run that finishes is a loss."""
    out = copy(world.baseline(target).directory, directory / "out")
    before = _content(out)
    file = directory / f"faulty{suffix}"
    file.write_bytes(content)
    command = world.stage(target, train_data=str(file))
    ended = child.run(world.action(target, command, out), directory / "log")
    expect(ended.code >= 0, f"expected one line, got death by signal {-ended.code}: {ended.last}")
    if ended.code == 0:
        expect(not must, "expected the file to be refused, but the run finished")
        return
    clear = "Traceback" not in ended.output and ended.last.startswith("rlhf-fast: ")
    expect(clear, f"expected one line, got exit code {ended.code}: {ended.output[-300:]!r}")
    expect(file.name in ended.last, f"expected the line to name the file, got {ended.last}")
    after = _content(out)
    changed = sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    expect(not changed, f"expected the earlier run's results to stay, but changed: {', '.join(changed[:3])}")


def _content(directory: Path) -> dict[Path, bytes]:
    return {path.relative_to(directory): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def _line(change: Callable[[dict], Any]) -> Callable[[bytes, str], tuple[str, bytes | None]]:
    """The third line's row is changed."""

    def fault(good: bytes, kind: str) -> tuple[str, bytes | None]:
        lines = good.decode().splitlines()
        changed = change(json.loads(lines[2]))
        if changed is None:
            return ".jsonl", None
        lines[2] = changed if isinstance(changed, str) else json.dumps(changed)
        return ".jsonl", ("\n".join(lines) + "\n").encode()

    return fault


def _text(text: str) -> Callable[[bytes, str], tuple[str, bytes | None]]:
    return _line(lambda row: text)


def _whole(suffix: str, change: Callable[[bytes], bytes]) -> Callable[[bytes, str], tuple[str, bytes | None]]:
    return lambda good, kind: (suffix, change(good))


def _of_kind(wanted: str, change: Callable[[dict], Any]) -> Callable[[bytes, str], tuple[str, bytes | None]]:
    return lambda good, kind: _line(change)(good, kind) if kind == wanted else (".jsonl", None)


FAULTS: dict[str, Callable[[bytes, str], tuple[str, bytes | None]]] = {
    "no JSON": _text("{'prompt': 'a'}"),
    "half a line": _text('{"prompt": "a'),
    "a list": _text('["a", "b"]'),
    "a number": _text("7"),
    "null": _text("null"),
    "NaN": _text("NaN"),
    "two objects": _text('{"prompt": "a"} {"prompt": "b"}'),
    "repeated key": _text('{"prompt": "a", "prompt": "b"}'),
    "nested brackets": _text("[" * 100_000 + "]" * 100_000),
    "integer of 5000 digits": _line(lambda row: json.dumps(row)[:-1] + f', "n": {"1" * 5000}}}'),
    "prompt missing": _line(lambda row: {k: v for k, v in row.items() if k != "prompt"}),
    "prompt a number": _line(lambda row: row | {"prompt": 3}),
    "prompt null": _line(lambda row: row | {"prompt": None}),
    "prompt a surrogate": _line(lambda row: json.dumps(row | {"prompt": "SURROGATE"}).replace("SURROGATE", "\\ud83d")),
    "prompt an object": _line(lambda row: row | {"prompt": {"text": "a"}}),
    "completion missing": _of_kind("sft", lambda row: {"prompt": row["prompt"]}),
    "completion a list": _of_kind("sft", lambda row: row | {"completion": ["a"]}),
    "rejected missing": _of_kind("preference", lambda row: {k: v for k, v in row.items() if k != "rejected"}),
    "margin of 400 digits": _of_kind("preference", lambda row: json.dumps(row)[:-1] + f', "margin": {"1" * 400}}}'),
    "margin 1e300": _of_kind("preference", lambda row: row | {"margin": 1e300}),
    "margin text": _of_kind("preference", lambda row: row | {"margin": "1"}),
    "label text": _of_kind("unpaired", lambda row: row | {"label": "yes"}),
    "label missing": _of_kind("unpaired", lambda row: {k: v for k, v in row.items() if k != "label"}),
    "no rows": _whole(".jsonl", lambda good: b""),
    "empty lines": _whole(".jsonl", lambda good: b"\n\n\n"),
    "UTF-16": _whole(".jsonl", lambda good: good.decode().encode("utf-16")),
    "zeros": _whole(".jsonl", lambda good: bytes(4096)),
    "no gzip": _whole(".jsonl.gz", lambda good: good),
    "half a gzip": _whole(".jsonl.gz", lambda good: gzip.compress(good)[:-20]),
    "flipped gzip": _whole(".jsonl.gz", lambda good: _flipped(gzip.compress(good))),
    "no Parquet": _whole(".parquet", lambda good: good),
    "half a Parquet": _whole(".parquet", lambda good: b"PAR1" + good[:100] + b"PAR1"),
    "no CSV": _whole(".csv", lambda good: b"a,b\n1\n\0\0"),
    "unknown suffix": _whole(".xyz", lambda good: good),
}


def _flipped(content: bytes) -> bytes:
    changed = bytearray(content)
    changed[len(changed) // 2] ^= 16
    return bytes(changed)


KIND = Kind(
    "malformed data files: one line, and an earlier run's results stay",
    STAGE_TARGETS,
    ("sft", "remax", "dpo", "kto"),
    cases,
)
