"""Metrics of a run: one JSON line per step, a progress bar with the key numbers, tables.

The JSON lines are the record and are flushed at every step. Bar and tables are for the eye. In a terminal the bar stays
at the bottom of the screen. Without a terminal (a pipe, a log file) a plain line appears after every tenth of the run.

Left out: TensorBoard and trackers, which are `listeners`.
"""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from rlhf_fast.data.damage import sentence, writing
from rlhf_fast.data.files import write_text
from rlhf_fast.ranks import current
from rlhf_fast.training.console import error_console, shown
from rlhf_fast.training.progress import drawn, new_bars
from rlhf_fast.training.stopped import Stopped


class MetricsLogger:
    """Context manager that records the metrics of a training run in output_dir/metrics.jsonl.

        with MetricsLogger(output_dir, 100, description="ppo", show=("objective/scores", "objective/kl")) as logger:
            for step in range(1, 101):
                logger.log(step, {"objective/scores": 0.3, "objective/kl": 1.2})

    A line is {"step": step, "time/elapsed": wall seconds of the run, **metrics}. NaN and infinity, which JSON cannot
    hold, are written as null.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike,
        total_steps: int,
        *,
        description: str,
        resume_step: int = 0,
        earlier: str = "",
        show: Sequence[str] = (),
    ) -> None:
        """resume_step: continue a run after that step. earlier: the `text` of the run up to that step; the file is
        made to hold it, and a line says where the file held something else. show: metrics to print beside the bar.
        Raises ValueError for total_steps < 1."""
        if total_steps < 1:
            raise ValueError(f"total_steps: expected at least 1, got {total_steps}")
        self.path = Path(output_dir) / "metrics.jsonl"
        self.total_steps = total_steps
        self.description = description
        self.resume_step = resume_step
        self._lines = earlier.splitlines(keepends=True)
        self.show = tuple(show)
        self._console = error_console()
        self._console.quiet = not current().first
        self._tenth = resume_step * 10 // total_steps

    def __enter__(self) -> "MetricsLogger":
        if current().first:
            found = self.path.read_bytes() if self.path.is_file() else b""
            if self.resume_step and not found.startswith(self.text.encode()):
                which = f"the metrics of the steps up to {self.resume_step}"
                self.say(f"{self.description}: {self.path} does not hold {which} as they were written; restored them")
            write_text(self.path, self.text)
        self._file = self.path.open("a") if current().first else open(os.devnull, "w")
        self._start = time.perf_counter() - (json.loads(self._lines[-1])["time/elapsed"] if self._lines else 0.0)
        self._bar, self._screen = None, ExitStack()
        if self._console.is_terminal and current().first:
            self._bar = new_bars(self._console)
            self._task = self._bar.add_task(
                self.description, total=self.total_steps, completed=self.resume_step, numbers=""
            )
            self._screen.enter_context(drawn(self._bar))
        return self

    @property
    def text(self) -> str:
        """What the file has to hold. A checkpoint keeps it, because the file may be damaged or deleted."""
        return "".join(self._lines)

    def log(self, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Records the metrics of `step` (from 1 on) and returns the row.

        metrics: numbers, strings, or tensors and arrays of one element.
        Raises Stopped where the file has been deleted, renamed or replaced.
        """
        self.check_there()
        row = {"step": step, "time/elapsed": round(time.perf_counter() - self._start, 3)}
        row |= {key: _plain(value) for key, value in metrics.items()}
        self._write(row)
        self._display(step, row)
        return row

    def _write(self, row: dict[str, Any]) -> None:
        safe = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._lines.append(json.dumps(safe, allow_nan=False) + "\n")
        with writing(self.path):
            self._file.write(self._lines[-1])
            self._file.flush()

    def check_there(self) -> None:
        """Raises Stopped where the file is no longer the one at its path, so that what is written would be lost."""
        if not current().first:
            return
        try:
            at_path = self.path.stat()
        except OSError as error:
            found = f"found no {self.path} ({error.strerror})"
            raise Stopped(f"output_dir: expected {self.path.parent} to stay while the run writes, {found}") from error
        if not os.path.samestat(at_path, os.fstat(self._file.fileno())):
            raise Stopped(f"output_dir: expected {self.path} to stay while the run writes, found another file there")

    def _display(self, step: int, row: dict[str, Any]) -> None:
        numbers = "  ".join(f"{key.split('/')[-1]} {format_value(key, row[key])}" for key in self.show if key in row)
        if self._bar:
            self._bar.update(self._task, completed=step, numbers=shown(numbers))
            return
        tenth = step * 10 // self.total_steps
        if tenth > self._tenth or step == self.resume_step + 1:
            self._tenth = tenth
            clock = timedelta(seconds=int(row["time/elapsed"]))
            line = f"{self.description}  {step}/{self.total_steps}  {clock}  {numbers}"
            self.say(line.rstrip())

    def say(self, line: str) -> None:
        """Prints a line, above the bar where there is one."""
        self._console.print(shown(line), highlight=False, soft_wrap=True, markup=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        with suppress(OSError):  # a row that found no room was told of when it was written
            self._file.close()
        self._screen.close()


def _plain(value: Any) -> Any:
    """Numbers as Python's own; tensors and arrays of one element as their number."""
    if hasattr(value, "item"):
        value = value.item()
    return value


def is_metrics(path: str | os.PathLike) -> bool:
    """Whether the file at `path` is a metrics.jsonl of ours, or none, or an empty one."""
    try:
        with Path(path).open("rb") as file:
            first = file.readline()
        return not first.strip() or {"step", "time/elapsed"} <= json.loads(first).keys()
    except (ValueError, AttributeError, TypeError):
        return False
    except FileNotFoundError:
        return True


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; [] where there is no file. A last line that a crash has cut short is left out.

    Raises ValueError, naming the file and the line, where the file is damaged.
    """
    path = Path(path)
    lines = path.read_bytes().splitlines(keepends=True) if path.is_file() else []
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.endswith(b"\n")]


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected metrics, but the line is damaged: {sentence(error)}") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f"{where}: expected the metrics of a step, got {sentence(ValueError(line.decode()))}")
    return row


def mean_and_se(values: Tensor) -> tuple[float, float]:
    """Mean and standard error over rows; the error of a single row is 0."""
    n = values.numel()
    return values.mean().item(), (values.std().item() / math.sqrt(n) if n > 1 else 0.0)


def format_value(key: str, value: Any) -> str:
    """A number for people: bytes in MiB, seconds with their unit, (mean, standard error) as mean +- error.

    The unit follows from the key: "memory/..." and "...bytes" are bytes, "time/..." and "...seconds" are seconds.
    """
    if value is None:
        return "-"
    if isinstance(value, tuple):
        mean, error = value
        digits = min(4, max(0, 1 - math.floor(math.log10(error)))) if error and math.isfinite(error) else 3
        return f"{mean:.{digits}f} ± {error:.{digits}f}"
    if isinstance(value, bool | str) or not isinstance(value, int | float):
        return shown(str(value))
    if key.startswith("memory/") or key.endswith("bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if key.startswith("time/") or key.endswith("seconds"):
        return f"{value * 1000:.3g} ms" if abs(value) < 1 else f"{value:,.1f} s"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:#.4g}".rstrip(".")
    return f"{value:.3g}"


def print_table(title: str, rows: Sequence[Mapping[str, Any]], *, console: Console | None = None) -> None:
    """Prints rows as a table; the columns are the keys in the order in which they first appear."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width; do not fold cells at 80 columns
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table()
    for column in columns:
        numeric = all(not isinstance(row.get(column), str) for row in rows)
        table.add_column(Text(shown(column)), justify="right" if numeric else "left")
    for row in rows:
        table.add_row(*(Text(format_value(column, row.get(column))) for column in columns))
    # Unwrapped, because a narrow table would break a path in its own title.
    console.print(Text(shown(title), style="italic"), soft_wrap=True)
    console.print(table)


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of `print_table` in Markdown.

    A heading loses its unit ("peak bytes", "step seconds"), because the cells show the unit.
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[column.removesuffix(" bytes").removesuffix(" seconds") for column in columns], ["---"] * len(columns)]
    lines += [[format_value(column, row[column]) if column in row else "" for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
