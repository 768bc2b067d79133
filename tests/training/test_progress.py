"""Bars that come and go below the training's bar; lines where there is no terminal."""

import io
import itertools
import time

import pytest
from rich.console import Console

from rlhf_fast.training import progress
from rlhf_fast.training.metrics import MetricsLogger
from rlhf_fast.training.progress import passes

PARTS = [slice(0, 4), slice(4, 8), slice(8, 10)]


def terminal(monkeypatch) -> io.StringIO:
    """Both consoles are one terminal of 80 columns, and what it is sent."""
    sent = io.StringIO()
    console = Console(file=sent, force_terminal=True, width=80, legacy_windows=False)
    for module in ("metrics", "progress"):
        monkeypatch.setattr(f"rlhf_fast.training.{module}.error_console", lambda: console)
    return sent


def screen(sent: str) -> list[str]:
    """The lines that a terminal shows in the end; colours are left out."""
    lines, row, column = [""], 0, 0
    i = 0
    while i < len(sent):
        if sent.startswith("\x1b[", i):
            end = next(j for j in range(i + 2, len(sent)) if sent[j].isalpha())
            number, kind = sent[i + 2 : end], sent[end]
            if kind == "A":
                row -= int(number or 1)
            elif kind == "K":
                lines[row] = "" if number == "2" else lines[row][:column]
            i = end + 1
            continue
        char, i = sent[i], i + 1
        if char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        else:
            lines[row] = lines[row][:column].ljust(column) + char + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines if line.strip()]


def test_a_pass_has_a_bar_that_goes_away(monkeypatch):
    sent = terminal(monkeypatch)
    assert list(passes("evaluation", PARTS)) == PARTS
    assert "evaluation" in sent.getvalue() and "10" in sent.getvalue()
    assert screen(sent.getvalue()) == []


def test_a_bar_below_the_trainings(tmp_path, monkeypatch):
    sent = terminal(monkeypatch)
    with MetricsLogger(tmp_path, 2, description="DPO") as logger:
        for _ in passes("reference", PARTS):
            assert [task.description for task in logger._bar.tasks] == ["DPO", "reference"]
        assert [task.description for task in logger._bar.tasks] == ["DPO"]
        logger.log(1, {})
        logger.say("said")
        logger.log(2, {})
    lines = screen(sent.getvalue())
    assert lines[0] == "said" and lines[-1].startswith("DPO") and "2/2" in lines[-1] and len(lines) == 2


def test_a_pass_that_fails_leaves_no_bar(tmp_path, monkeypatch):
    sent = terminal(monkeypatch)
    with pytest.raises(ZeroDivisionError), MetricsLogger(tmp_path, 2, description="DPO"):
        for _ in passes("reference", PARTS):
            raise ZeroDivisionError
    assert [line.split()[0] for line in screen(sent.getvalue())] == ["DPO"]
    assert progress._on_screen == []


def test_lines_without_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(time, "monotonic", itertools.count(0.0, 6.0).__next__)
    assert list(passes("evaluation", [slice(i, i + 1) for i in range(5)])) == [slice(i, i + 1) for i in range(5)]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["evaluation  2/5  0:00:12", "evaluation  4/5  0:00:24", "evaluation  5/5  0:00:30"]


def test_short_passes_say_nothing_but_where_they_always_do(capsys):
    assert list(passes("evaluation", PARTS)) == PARTS and list(passes("nothing", [])) == []
    assert capsys.readouterr().err == ""
    assert list(passes("reference", PARTS, always=True)) == PARTS
    assert capsys.readouterr().err == "reference  10/10  0:00:00\n"
