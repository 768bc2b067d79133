"""The progress of passes over many rows: the reference's before DPO's first step, evaluations, sampling and labelling.

In a terminal a pass has a bar, below the bar of the training where there is one. The bar goes away with the pass's end.
Without a terminal a line appears every ten seconds, so that a short pass says nothing.

    for rows in passes("evaluation", micro_batches(len(prompts), 64)):
        ...
"""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column

from rlhf_fast.ranks import current
from rlhf_fast.training.console import error_console

_EVERY = 10.0  # seconds from line to line
_on_screen: list[Progress] = []  # rich draws one group of bars at a time


def new_bars(console: Console, *, transient: bool = False) -> Progress:
    """A group of bars, not drawn yet. transient: it leaves nothing on the screen."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("<"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis")),
        console=console,
        redirect_stdout=sys.stdout.isatty(),  # to a pipe, print() goes past the bar
        transient=transient,
    )


@contextmanager
def drawn(bars: Progress) -> Iterator[None]:
    """Inside, the group is on the screen, and `passes` adds its bars to the group."""
    own = set(bars.task_ids)
    bars.start()
    _on_screen.append(bars)
    try:
        yield
    finally:
        _on_screen.remove(bars)
        for task in set(bars.task_ids) - own:  # of passes that an exception ended
            bars.remove_task(task)
        bars.stop()


def passes(what: str, parts: Sequence[slice], *, always: bool = False) -> Iterator[slice]:
    """The slices `parts` one after the other, with the progress of the rows that they cut up.

    what: the name of the pass. always: without a terminal, also say the end of a short pass.
    """
    total, console = parts[-1].stop if parts else 0, error_console()
    if not current().first:
        yield from parts
    elif not console.is_terminal:
        yield from _with_lines(what, parts, total, console, always)
    elif _on_screen:
        yield from _with_bar(what, parts, total, _on_screen[-1])
    else:
        bars = new_bars(console, transient=True)
        with drawn(bars):
            yield from _with_bar(what, parts, total, bars)


def _with_bar(what: str, parts: Sequence[slice], total: int, bars: Progress) -> Iterator[slice]:
    task = bars.add_task(what, total=total, numbers="")
    try:
        for part in parts:
            yield part
            bars.update(task, completed=part.stop)
    finally:
        if task in bars.task_ids:
            bars.remove_task(task)


def _with_lines(what: str, parts: Sequence[slice], total: int, console: Console, always: bool) -> Iterator[slice]:
    begin = last = time.monotonic()
    for part in parts:
        yield part
        now, ended = time.monotonic(), part is parts[-1]
        if now - last >= _EVERY or (ended and (always or last > begin)):
            last = now
            line = f"{what}  {part.stop}/{total}  {timedelta(seconds=int(now - begin))}"
            console.print(line, highlight=False, soft_wrap=True, markup=False)
