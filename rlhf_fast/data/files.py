"""Files that are whole or not there, because they are written beside their place and then renamed into it.

What is being written, has been replaced or is being deleted has a name of its own kind, so that a crash leaves nothing
that passes for something else, and the next run in the directory cleans it up:

    .rlhf_fast-writing-NAME    deleted by `sweep`; that of a file names the process too, so that two may write at once
    .rlhf_fast-replaced-NAME   gets its name back where nothing has taken its place, else deleted
    .rlhf_fast-deleting-NAME   deleted
    .rlhf_fast-lock-NAME       the lock of a file that a command writes outside of an output directory
"""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from rlhf_fast.data.damage import writing

OURS = ".rlhf_fast-"
WRITING, REPLACED, DELETING, LOCKING = (f"{OURS}{what}-" for what in ("writing", "replaced", "deleting", "lock"))
_LONGEST = 255  # bytes of a name


def beside(path: Path, kind: str) -> Path:
    """The name beside `path` of what is WRITING, REPLACED or DELETING. A name that would be too long is a hash."""
    name = f"{kind}{path.name}"
    if len(os.fsencode(name)) > _LONGEST:
        name = f"{kind}{_digest(path.name)}"
    return path.with_name(name)


def _digest(name: str) -> str:
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def being_written(path: Path) -> Path:
    """The name under which this process writes the file `path`."""
    return beside(path, f"{WRITING}{os.getpid()}-")


def sweep(directory: Path) -> None:
    """Cleans up what a crash left in a directory to which nobody else writes now."""
    for path in list(directory.iterdir()):
        if path.name.startswith(REPLACED) and not (named := directory / path.name.removeprefix(REPLACED)).exists():
            os.replace(path, named)
        elif path.name.startswith((WRITING, REPLACED, DELETING)):
            remove(path)


def sweep_file(path: Path) -> None:
    """Cleans up what a crash left of the file `path`, which nobody else writes now."""
    for other in list(path.parent.glob(f"{WRITING}*")):
        pid, _, name = other.name.removeprefix(WRITING).partition("-")
        if pid.isdecimal() and name in (path.name, _digest(path.name)):
            remove(other)


def remove(path: Path) -> None:
    """Deletes a file, a link or a whole directory, where it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def check_name(argument: str, path: str | os.PathLike, room: int = 0) -> None:
    """ValueError, naming the argument, for a path that no file system takes.

    room: bytes that the paths of files below `path` are longer.
    """
    text = os.fspath(path)
    try:
        text.encode()
        os.lstat(os.path.join(os.path.abspath(text), "x" * room))
    except UnicodeEncodeError as error:
        raise ValueError(f"{argument}: expected a path in UTF-8, got {text!r}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(
                f"{argument}: expected a shorter path or name, got {len(os.fsencode(text))} bytes"
            ) from error


def check_writable(argument: str, path: str | os.PathLike) -> None:
    """ValueError, naming the argument, where no file could be written to `path`. Changes nothing."""
    check_name(argument, path)
    if Path(path).is_dir():
        raise ValueError(f"{argument}: expected a file to write, got the directory {path}")
    parent = Path(path).absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise ValueError(f"{argument}: expected a file that can be written, got {path}, but {parent} takes no files")


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes bytes to the file `path`, and makes its directory."""
    path = Path(path)
    written = being_written(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            written.write_bytes(content)
            os.replace(written, path)
        except OSError:
            written.unlink(missing_ok=True)  # what was written of it would keep the disk full
            raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text in UTF-8 to the file `path`, and makes its directory."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes anything that JSON can hold to the file `path`, indented by two spaces, and makes its directory."""
    write_text(path, json.dumps(content, indent=2) + "\n")
