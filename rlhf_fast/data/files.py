"""Files that are whole or not there: written beside their place, then renamed into it."""

import os
from pathlib import Path


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes the file, and makes its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.new")
    beside.write_bytes(content)
    os.replace(beside, path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """The same for text, in UTF-8."""
    write_bytes(path, text.encode())
