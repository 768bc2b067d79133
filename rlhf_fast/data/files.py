"""Files that are whole or not there, because they are written beside their place and then renamed into it."""

import json
import os
from pathlib import Path
from typing import Any


def check_writable(argument: str, path: str | os.PathLike) -> None:
    """ValueError, naming the argument, where no file could be written to `path`. Changes nothing."""
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
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes text in UTF-8 to the file `path`, and makes its directory."""
    write_bytes(path, text.encode())


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Writes anything that JSON can hold to the file `path`, indented by two spaces, and makes its directory."""
    write_text(path, json.dumps(content, indent=2) + "\n")
