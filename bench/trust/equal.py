"""Whether two directories hold the same results, but for what depends on the clock and on where they lie.

Equal: the names of all files; weights and tokenizers byte for byte; rows, samples, metrics and every other JSON without
times and memory. state.pt is compared by its tensors, and so are the parts that DCP writes, because the keys of its
headers have no order.
"""

import gzip
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

_MEASURED = re.compile(r"(^|[/_ ])(time|memory|seconds|bytes)([/_ ]|$)|per_(second|minute)")
_SECONDS = re.compile(r"\bin \d+ s\b")  # in a sentence of a report
_ABOUT = {"output_dir", "environment", "resume", "command", "date", "phases", "time_model", "phase_seconds"}
_ABOUT |= {"static_bytes", "meter", "resumed", "peaks"}
_PICTURES = {".png", ".html", ".md", ".txt", ".csv"}  # drawn with times in them, or logs


def differences(got: Path, wanted: Path, limit: int = 3, ignoring: frozenset[str] = frozenset()) -> list[str]:
    """What differs, a short line each, or an empty list. ignoring: further keys of JSON files that may differ."""
    files, expected = names(got), names(wanted)
    found = [f"{name} is left over" for name in sorted(files - expected)]
    found += [f"{name} is missing" for name in sorted(expected - files)]
    for name in sorted(files & expected):
        if len(found) >= limit:
            break
        try:
            found += _difference(got / name, wanted / name, got, wanted, ignoring)
        except Exception as error:  # an unreadable file is a difference
            found.append(f"{name}: {type(error).__name__}: {error}")
    return found[:limit]


def names(directory: Path) -> set[str]:
    """The files in a directory and in its folders, and the folders that hold nothing."""
    found = [path for path in directory.rglob("*") if not path.is_dir() or not any(path.iterdir())]
    return {str(path.relative_to(directory)) for path in found}


def _difference(file: Path, other: Path, root: Path, other_root: Path, ignoring: frozenset[str]) -> list[str]:
    name = str(file.relative_to(root))
    if file.suffix in _PICTURES:
        same = bool(file.stat().st_size) == bool(other.stat().st_size)
    elif file.suffix == ".pt":
        same = _same(_state(file, ignoring), _state(other, ignoring))
    elif file.parent.name == "state" and file.suffix == ".safetensors":
        same = _parts(file) == _parts(other)
    elif file.name == "checkpoint.json":
        content, expected = json.loads(file.read_text()), json.loads(other.read_text())
        same = content["complete"] == expected["complete"] and sorted(content["entries"]) == sorted(expected["entries"])
    elif file.suffix in (".json", ".jsonl", ".gz"):
        return [f"{name}: {said}" for said in _first(read(file, root, ignoring), read(other, other_root, ignoring))]
    else:
        same = file.read_bytes() == other.read_bytes()
    return [] if same else [f"{name}: other content"]


def _state(file: Path, ignoring: frozenset[str]) -> Any:
    """The tensors and values of a state.pt, its metrics as rows without what was measured."""
    state = torch.load(file, weights_only=True)
    if isinstance(state, dict) and isinstance(text := state.get("metrics"), str):
        rows = [json.loads(line) for line in text.splitlines()]
        return {**state, "metrics": _without_measures(rows, _ABOUT | ignoring)}
    return state


def _parts(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes after it."""
    content = file.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:begin]), content[begin:]


def read(file: Path, root: Path, ignoring: frozenset[str] = frozenset()) -> Any:
    """The JSON of a file, or a list of its lines' JSON, without what was measured; `root` reads OUT."""
    text = gzip.decompress(file.read_bytes()).decode() if file.suffix == ".gz" else file.read_text()
    text = _SECONDS.sub("in so many s", text.replace(str(root), "OUT"))
    rows = [json.loads(line) for line in text.splitlines()] if ".jsonl" in file.name else json.loads(text)
    return _without_measures(rows, _ABOUT | ignoring)


def _without_measures(value: Any, left_out: Collection[str]) -> Any:
    if isinstance(value, list):
        return [_without_measures(one, left_out) for one in value]
    if not isinstance(value, dict):
        return value
    kept = {k: v for k, v in value.items() if k not in left_out and not _MEASURED.search(k)}
    return {key: _without_measures(one, left_out) for key, one in kept.items()}


def _first(got: Any, wanted: Any, where: str = "") -> list[str]:
    """The first place where two values differ, if there is one."""
    if isinstance(got, dict) and isinstance(wanted, dict) and got.keys() == wanted.keys():
        pairs = [(f"{where}.{key}", got[key], wanted[key]) for key in got]
    elif isinstance(got, dict) and isinstance(wanted, dict):
        return [f"{where} has other keys: {', '.join(sorted(got.keys() ^ wanted.keys()))}"]
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        pairs = [(f"{where}[{i}]", *both) for i, both in enumerate(zip(got, wanted, strict=True))]
    else:
        return [] if got == wanted else [f"{where} is {str(got)[:60]!r}, expected {str(wanted)[:60]!r}"]
    return next((found for place, a, b in pairs if (found := _first(a, b, place))), [])


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.dtype, a.shape, a.device) != (b.dtype, b.shape, b.device):
            return False
        return a.is_meta or torch.equal(a, b)  # a part that other files hold has a shape alone in state.pt
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {key for key in a.keys() | b.keys() if key not in _ABOUT and not _MEASURED.search(str(key))}
        return all(key in a and key in b and _same(a[key], b[key]) for key in keys)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b
