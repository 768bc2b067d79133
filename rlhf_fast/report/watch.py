"""`rlhf-fast watch`: the curves of a run in the terminal, drawn anew while the run writes. plotext draws them."""

import math
import time
from datetime import timedelta
from pathlib import Path

import plotext
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlhf_fast.config import WatchConfig
from rlhf_fast.report.curves import CURVES, points
from rlhf_fast.report.plots import MethodRun
from rlhf_fast.report.runs import METRICS, find_runs, load_runs
from rlhf_fast.training.metrics import format_value

_WIDTH, _HEIGHT = 46, 10  # of a panel with its axes, in characters; wider panels where the terminal is wider
_FILE_WIDTH = 100  # of what goes to a file, which has no width


def run(config: WatchConfig) -> None:
    """Shows the curves until the run ends, or until Ctrl-C. Without a terminal they are printed once."""
    console = Console()
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    if config.once or not console.is_terminal:
        console.print(view(newest(config.dir), console.width, console.height))
        return
    with Live(console=console, auto_refresh=False, screen=True) as live:
        while True:
            directory = newest(config.dir)
            live.update(view(directory, console.width, console.height), refresh=True)
            if ended(directory):
                break
            time.sleep(config.every)
    console.print(view(directory, console.width, console.height))


def newest(given: str) -> Path:
    """The run's directory: `given`, or the one of the runs in it that wrote last. Raises ValueError: there is none."""
    return max(find_runs([given], "dir"), key=lambda directory: (directory / METRICS).stat().st_mtime_ns)


def ended(directory: Path) -> bool:
    """Whether the run has written its record after its last row."""
    record = directory / "run.json"
    return record.is_file() and record.stat().st_mtime_ns >= (directory / METRICS).stat().st_mtime_ns


def view(directory: Path, width: int, height: int) -> Group:
    """A line about the run, and as many panels as fit into so many columns and lines."""
    if not (directory / METRICS).read_bytes().strip():
        return Group(Text(f"{directory}: no step yet"))
    (run,) = load_runs([directory])
    row = run.history[-1]
    clock = timedelta(seconds=int(row.get("time/elapsed", 0)))
    state = "ended" if ended(directory) else "running"
    line = f"{run.name}  step {row['step']}  {clock}  {state}"
    if "time/step" in row:
        line += f"  {format_value('time/step', row['time/step'])} a step"
    line += f"  {directory}"
    columns = max(1, width // _WIDTH)
    rows = max(1, (height - 3) // _HEIGHT)
    panels = [panel for curve in CURVES if (panel := _panel(run, curve, width // columns))][: columns * rows]
    grid = Table.grid()
    for first in range(0, len(panels), columns):
        grid.add_row(*panels[first : first + columns])
    return Group(Text(line, no_wrap=True, overflow="ellipsis"), grid)


def _panel(run: MethodRun, name: str, width: int) -> Text | None:
    """The metric over the steps with its last value in the title; None where the run has less than two values."""
    steps, values = points(run, CURVES[name])
    finite = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if len(finite) < 2:
        return None
    steps, values = (list(part) for part in zip(*finite, strict=True))
    title = f"{CURVES[name].title.partition(' (')[0]}: {format_value(name, values[-1])}"
    plotext.clear_figure()
    plotext.theme("clear")
    plotext.limit_size(False, False)
    plotext.plotsize(width - 2, _HEIGHT)
    plotext.title(title if len(title) < width - 4 else f"{title[: width - 7]}...")
    plotext.plot(steps, values, marker="braille")
    plotext.xticks(sorted({steps[0], steps[len(steps) // 2], steps[-1]}))
    lines = Text.from_ansi(plotext.build().rstrip("\n"), no_wrap=True).split("\n")
    return Text("\n").join(lines)
