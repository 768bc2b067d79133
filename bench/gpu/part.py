"""What a part of the hour is, what it is given, and where it leaves what it has found."""

import contextlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.gpu.predict import Work, seconds
from rlhf_fast.data.files import write_text

Toy = TypeVar("Toy")


@dataclass(frozen=True)
class Setting:
    """dry: on the CPU, with toy shapes. scratch: a directory of the part's own. results: where files for people go."""

    dry: bool
    scratch: Path = Path()
    results: Path = Path()

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Where tensors live."""
        return "cpu" if self.dry else "cuda"

    def pick(self, real: Toy, toy: Toy) -> Toy:
        """The shapes of a run, or those of a dry run."""
        return toy if self.dry else real


@dataclass
class Found:
    """What a part has found so far. Every row is written at once, so that a part that is killed leaves its rows."""

    path: Path
    rows: list[dict[str, str]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def row(self, what: str, measured: str, beside: str = "") -> None:
        """A row of the table: what was measured, and beside what."""
        self.rows.append({"what": what, "measured": measured, "beside": beside})
        self.write()

    def fail(self, text: str) -> None:
        """Something that is wrong, and does not end the part."""
        self.failures.append(text)
        self.write()

    @contextlib.contextmanager
    def expecting(self, what: str) -> Any:
        """An exception inside is a failure of `what`, and the part goes on, unless the device is lost."""
        try:
            yield
        except Exception as error:
            said = f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.fail(said)
            if "CUDA error" in said or isinstance(error, MemoryError):  # every later call would fail too
                raise

    def write(self) -> None:
        """To the file that the hour reads."""
        content = {"rows": self.rows, "failures": self.failures, "details": self.details}
        write_text(self.path, json.dumps(content, indent=1) + "\n")


@dataclass(frozen=True, kw_only=True)
class Part:
    """work: its pieces, for the prediction. limit: seconds after which it is ended."""

    name: str
    help: str
    limit: float
    work: Callable[[Setting], Iterable[Work]]

    def predicted(self, setting: Setting) -> float:
        """Seconds, computed."""
        return seconds(self.work(setting))
