"""What the hour has found so far, as JSON and as one Markdown table. Both files are whole or not there."""

import json
from pathlib import Path
from typing import Any

from rlhf_fast.data.files import write_text
from rlhf_fast.training.metrics import markdown_table

DONE, FAILED, KILLED, NOT_BEGUN, RUNNING = "done", "failed", "killed", "not begun", "running"
NOT_MEASURED = "not measured"


class Record:
    """The file of an hour: {"about", "dry", "parts": {name: {"state", "why", "seconds", "predicted", "limit"}}}."""

    def __init__(self, path: Path, names: list[str], content: dict[str, Any]) -> None:
        self.path, self.names, self.content = path, names, content

    @classmethod
    def begin(cls, path: Path, names: list[str], about: dict[str, Any], dry: bool) -> "Record":
        """An hour of which nothing has been done."""
        return cls(path, names, {"about": about, "dry": dry, "parts": {}})

    @classmethod
    def resume(cls, path: Path, names: list[str], dry: bool) -> "Record":
        """The hour in a file. Raises ValueError where there is none, or another kind of run made it."""
        if not path.is_file():
            raise ValueError(f"--resume: expected the results of an earlier call at {path}, found none")
        content = json.loads(path.read_text())
        if content["dry"] != dry:
            raise ValueError(f"--resume: expected the results of {'a dry' if dry else 'no dry'} run at {path}")
        return cls(path, names, content)

    def state(self, name: str) -> str:
        """Of a part."""
        return self.content["parts"].get(name, {}).get("state", NOT_MEASURED)

    def missing(self) -> list[str]:
        """The parts that are not done: those never tried first, because the others may hang or fail again."""
        tried = (FAILED, KILLED, RUNNING)
        open_ = [name for name in self.names if self.state(name) != DONE]
        return sorted(open_, key=lambda name: self.state(name) in tried)

    def put(self, name: str, **values: Any) -> None:
        """Notes these values of a part, and writes both files."""
        self.content["parts"].setdefault(name, {}).update(values)
        write_text(self.path, json.dumps(self.content, indent=1) + "\n")
        write_text(self.path.with_suffix(".md"), self.markdown())

    def rows(self) -> list[dict[str, str]]:
        """The table: a row of each part's own, then what it has found and what is wrong."""
        table = []
        for name in self.names:
            part = self.content["parts"].get(name, {})
            took = f"{part['seconds']:.0f} s" if part.get("seconds") is not None else ""
            why = f": {part['why']}" if part.get("why") else ""
            limits = f"predicted {part['predicted']:.0f} s (computed), limit {part['limit']:.0f} s" if part else ""
            table.append(_row(name, f"**{self.state(name)}**{why}", took, limits))
            table += [_row(name, *row.values()) for row in part.get("rows", [])]
            table += [_row(name, "**WRONG**", failure) for failure in part.get("failures", [])]
        return table

    def markdown(self) -> str:
        """The page."""
        about = ", ".join(f"{key} {value}" for key, value in self.content["about"].items())
        dry = "A dry run on the CPU with toy shapes: its times say nothing of a GPU." if self.content["dry"] else ""
        parts = ["# The first hour on a GPU", about + ".", *([dry] if dry else []), markdown_table(self.rows())]
        return "\n\n".join(parts) + "\n"


def _row(part: str, what: str, measured: str, beside: str = "") -> dict[str, str]:
    return {"part": part, "what": what, "measured": measured, "beside": beside}
