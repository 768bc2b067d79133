"""checkpoint.json: what a directory that this package wrote holds, and whether all of it is there.

    {"complete": true, "entries": ["config.json", "model.safetensors", "value", ...]}

The file says `"complete": false` while entries are moved into the directory. A crash leaves it so, and nothing in the
directory is then read.
"""

import functools
import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rlhf_fast.data.files import write_json

NAME = "checkpoint.json"
_OF_MODELS = {".bin", ".jinja", ".json", ".model", ".safetensors", ".tiktoken", ".txt"}
_OF_RUNS = {NAME, "run.json", "run_config.json", "samples.json", "samples_before.json", "training_args.bin"}


class Manifest(NamedTuple):
    """The content of a checkpoint.json."""

    entries: list[str]  # the names in the directory, folders included
    complete: bool


def read(directory: str | os.PathLike) -> Manifest | None:
    """The manifest in `directory`, or None where there is none. Raises ValueError where it is damaged."""
    path = Path(directory, NAME)
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        values = json.loads(text)
        return Manifest([str(name) for name in values["entries"]], bool(values["complete"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"checkpoint: expected JSON with entries and complete in {path}, which is damaged") from error


def write(directory: str | os.PathLike, manifest: Manifest) -> None:
    """Writes the manifest to `directory`."""
    write_json(Path(directory, NAME), {"complete": manifest.complete, "entries": sorted(manifest.entries)})


def model_files(directory: str | os.PathLike) -> list[Path]:
    """The files of `directory` that a model and its tokenizer are made of, in order; not what a run says of itself."""
    files = [file for file in Path(directory).iterdir() if file.suffix in _OF_MODELS and file.name not in _OF_RUNS]
    return sorted(file for file in files if not file.name.startswith(".") and file.is_file())


def digest(path: Path) -> str:
    """SHA-256 of a file, 0.3 s for 500 MB. A file that has not changed since is not read twice by a process."""
    found = path.stat()
    return _digest(os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns)


@functools.cache
def _digest(path: str, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_complete(path: str | os.PathLike, argument: str = "model") -> None:
    """ValueError, naming the argument, where `path` is a directory of ours that a crash left incomplete.

    A folder of a checkpoint, such as that of the value model, has the manifest of the checkpoint.
    """
    directory, found = _of(Path(path))
    if found is not None and not found.complete:
        raise ValueError(
            f"{argument}: expected a complete checkpoint, but a run was cut off while it wrote {directory}"
        )


def _of(path: Path) -> tuple[Path, Manifest | None]:
    """The directory with the manifest that speaks of `path`, and the manifest."""
    parent = path.absolute().parent
    if (own := read(path)) is None:
        with suppress(ValueError):  # a file of this name above a model may be anybody's
            above = read(parent)
            if above is not None and path.name in above.entries:
                return parent, above
    return path, own
