"""Files that are whole or not there, because they are written beside their place and then renamed into it."""

import json
import os
from pathlib import Path
from typing import Any


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
