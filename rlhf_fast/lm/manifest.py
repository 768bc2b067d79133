"""checkpoint.json: what a directory that this package wrote holds, whether all of it is there, and its checksums.

    {"complete": true, "entries": ["config.json", "model.safetensors", "value", ...],
     "files": {"config.json": "9f8e...", "value/model.safetensors": "71c0...", ...}}

The file says `"complete": false` while entries are moved into the directory. A crash leaves it so, and nothing in the
directory is then read. Checksums are SHA-256: 500 MB take 0.3 s on a core with SHA instructions, where BLAKE2b takes
0.6 s and CRC-32 0.1 s. The same numbers say by content what a later run was made with, for which CRC-32 is too short.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.data.files import write_json

NAME = "checkpoint.json"
_PIECE = 1 << 20  # bytes
_WEIGHTS = {".bin", ".safetensors"}
_OF_MODELS = _WEIGHTS | {".jinja", ".json", ".model", ".tiktoken", ".txt"}
_OF_RUNS = {NAME, "run.json", "run_config.json", "samples.json", "samples_before.json", "training_args.bin"}


class Manifest(NamedTuple):
    """The content of a checkpoint.json."""

    entries: list[str]  # the names in the directory, folders included
    complete: bool
    files: dict[str, str] = {}  # path within the directory -> SHA-256; {} where an older version wrote the manifest


def read(directory: str | os.PathLike) -> Manifest | None:
    """The manifest in `directory`, or None where there is none. Raises ValueError where it is damaged."""
    path = Path(directory, NAME)
    try:
        text = path.read_text(errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(text)
        entries = [str(name) for name in values["entries"]]
        return Manifest(entries, bool(values["complete"]), dict(values.get("files", {})))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"checkpoint: expected JSON with entries and complete in {path}, which is damaged") from error


def write(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Writes the manifest to `directory`."""
    values = {"complete": manifest.complete, "entries": sorted(manifest.entries), "files": manifest.files}
    write_json(Path(directory, NAME), values)


def of_files(directory: Path) -> Manifest:
    """The manifest of a directory that is whole, with the checksums of all its files."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != NAME)
    names = [path.relative_to(directory).as_posix() for path in files]
    return Manifest(sorted(os.listdir(directory)), True, dict(zip(names, _digests(files), strict=True)))


def damage(directory: str | os.PathLike) -> str | None:
    """What is wrong with a directory of ours, as half a sentence; None where all files are as they were saved."""
    try:
        found = read(directory)
    except ValueError:
        return f"{NAME} cannot be read"
    if found is None or not found.complete:
        return "a run was cut off while it wrote it"
    return _changed(Path(directory), found.files)


def check(path: str | os.PathLike, argument: str = "model", *, weights: bool = False) -> None:
    """ValueError, naming the argument, where a directory of ours is incomplete or a file of its model has changed.

    weights: read the weights too, which takes 0.6 s for each GB; the other files are small.
    A folder of a checkpoint, such as that of the value model, has the manifest of the checkpoint.
    """
    directory, found = _of(Path(path))
    if found is None:
        return
    if not found.complete:
        raise ValueError(
            f"{argument}: expected a complete checkpoint, but a run was cut off while it wrote {directory}"
        )
    kinds = _OF_MODELS if weights else _OF_MODELS - _WEIGHTS
    inside = Path(path).absolute().relative_to(directory.absolute())
    files = {
        name: value
        for name, value in found.files.items()
        if Path(name).parent == inside and Path(name).suffix in kinds and Path(name).name not in _OF_RUNS
    }
    if (changed := _changed(directory, files)) is not None:
        raise ValueError(
            f"{argument}: expected {directory} as it was saved, but {changed}; after an edit of your own, delete "
            f"{directory / NAME}"
        )


def model_files(directory: str | os.PathLike) -> list[Path]:
    """The files of `directory` that a model and its tokenizer are made of, in order; not what a run says of itself.

    In a directory of ours they are among those that were saved. A study, for example, adds files of its own later.
    """
    saved = None
    with suppress(ValueError):
        saved = read(directory)
    files = [file for file in Path(directory).iterdir() if file.suffix in _OF_MODELS and file.name not in _OF_RUNS]
    files = [file for file in files if saved is None or file.name in saved.entries]
    return sorted(file for file in files if not file.name.startswith(".") and file.is_file())


def digest(path: Path) -> str:
    """SHA-256 of a file. A process reads a file once, unless the file has changed since."""
    found = path.stat()
    return _digest(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: str, *_: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _digests(files: Iterable[Path]) -> list[str]:
    with ThreadPoolExecutor(4) as pool:  # hashlib leaves the interpreter's lock
        return list(pool.map(digest, files))


def _changed(directory: Path, files: dict[str, str]) -> str | None:
    """The first of these files that is not there, or not as it was saved."""
    for name in files:
        if not (directory / name).is_file():
            return f"{name} is missing"
    for (name, saved), now in zip(files.items(), _digests(directory / name for name in files), strict=True):
        if now != saved:
            return f"{name} has changed or is damaged"
    return None


def _of(path: Path) -> tuple[Path, Manifest | None]:
    """The directory with the manifest that speaks of `path`, and the manifest."""
    parent = path.absolute().parent
    if (own := read(path)) is None:
        with suppress(ValueError):  # a file of this name above a model may be anybody's
            above = read(parent)
            if above is not None and path.name in above.entries:
                return parent, above
    return path, own
