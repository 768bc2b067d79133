"""Files that cannot be written or read, in one sentence with the path.

On a full disk torch, safetensors and tokenizers raise exceptions of their own, without a path. Of a damaged file they
say what their parser met, without a path either.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What torch's writer (a zip file) and Rust libraries say of a write that failed.
_TORCH = re.compile(r"inline_container|PytorchStreamWriter|unexpected pos|iostream error")
_RUST = re.compile(r"\(os error (\d+)\)")
_ROOM = 2**20  # bytes: a disk with less free space is full
_SAID = 200  # characters of a reason that a message repeats


@contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Inside, a write that fails raises an OSError whose text names `path`; other exceptions pass."""
    try:
        yield
    except Exception as error:
        if (code := _failed_write(error, Path(path))) is None:
            raise
        told = OSError(f"{path} could not be written: {os.strerror(code)}; the files from before are as they were")
        told.errno = code
        raise told from error


def _failed_write(error: Exception, path: Path) -> int | None:
    """The errno of an exception that tells of a failed write, else None."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    if found := _RUST.search(str(error)):
        return int(found[1])
    if not _TORCH.search(str(error)):
        return None
    while not path.exists():
        path = path.parent
    return errno.ENOSPC if shutil.disk_usage(path).free < _ROOM else errno.EIO


def read_json(path: str | os.PathLike, kind: type = dict) -> Any:
    """What a JSON file holds. Raises ValueError, naming the file, where it is no JSON or holds another kind."""
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected JSON, but the file is damaged: {sentence(error)}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{path}: expected JSON with {_KINDS[kind]}, got {type(found).__name__}")
    return found


_KINDS = {dict: "named values", list: "a list"}


def sentence(error: BaseException) -> str:
    """What an exception says, in one line that is not too long; its kind where it says nothing."""
    said = " ".join(str(error).split())
    return f"{said[:_SAID]}..." if len(said) > _SAID else said or type(error).__name__
