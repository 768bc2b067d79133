"""What reaches the console: no control characters, and no exception where the console is gone."""

import errno
import io
import sys
import warnings

import pytest
from rich.console import Console

from rlhf_fast import cli
from rlhf_fast.training import console
from rlhf_fast.training.metrics import MetricsLogger, print_table

TITLE = "\x1b]0;PWNED\x07\x1b[2J"  # names the terminal's window, and clears its screen
SHOWN = r"\x1b]0;PWNED\x07\x1b[2J"
FLAGS = ["--output-dir", "o", "--train-data", "t.jsonl"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TITLE, SHOWN),
        ("a\tb\nc", "a\tb\nc"),
        ("\r\x00\x7f\x9b31m", r"\r\x00\x7f\x9b31m"),
        ("good \u202elive", r"good \u202elive"),
        ("half \ud83d", r"half \ud83d"),
        ("größe 😀 \\x1b", "größe 😀 \\x1b"),
    ],
)
def test_control_characters_are_shown(text, expected):
    assert console.shown(text) == expected


def test_an_error_of_a_command_is_shown(monkeypatch, capsys):
    def train(config):
        raise ValueError(f"{config.model}: got the roles {TITLE}")

    monkeypatch.setattr("rlhf_fast.stages.sft.train", train)
    assert cli.main(["sft", "--model", f"m{TITLE}", *FLAGS]) == 1
    assert capsys.readouterr().err == f"rlhf-fast: m{SHOWN}: got the roles {SHOWN} (--debug shows where)\n"
    assert cli.main([f"s{TITLE}"]) == 2
    assert "\x1b" not in capsys.readouterr().err


def test_tables_bars_and_lines_are_shown(tmp_path, monkeypatch, capsys):
    print_table(TITLE, [{TITLE: TITLE, "[red]n[/red]": 1.0}])
    table = capsys.readouterr().out
    assert table.count(SHOWN) == 3 and "\x1b" not in table and "[red]n[/red]" in table
    name = f"objective/scores/{TITLE}"
    with MetricsLogger(tmp_path, 1, description="t", show=(name,)) as logger:
        logger.say(TITLE)
        logger.log(1, {name: 2.0})
    assert capsys.readouterr().err == f"{SHOWN}\nt  1/1  0:00:00  {SHOWN} 2.000\n"
    screen = io.StringIO()
    monkeypatch.setattr("rlhf_fast.training.metrics.error_console", lambda: Console(file=screen, force_terminal=True))
    with MetricsLogger(tmp_path, 1, description="t", show=(name,)) as logger:
        logger.log(1, {name: 2.0})
    assert "PWNED" in screen.getvalue() and "\x1b]0" not in screen.getvalue()


class Gone(io.StringIO):
    """A stream that takes nothing."""

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error

    def isatty(self) -> bool:
        raise self.error


@pytest.mark.parametrize("error", [BrokenPipeError(errno.EPIPE, "x"), OSError(errno.ENOSPC, "x"), ValueError("closed")])
def test_a_console_that_is_gone_ends_nothing(error, tmp_path, monkeypatch):
    gone = Gone()
    gone.error = error
    monkeypatch.setattr(sys, "stderr", gone)
    with MetricsLogger(tmp_path, 2, description="t", show=("loss",)) as logger:
        logger.say("a line")
        logger.log(1, {"loss": 1.0})
        logger.log(2, {"loss": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_letters_that_the_console_does_not_have_are_written_as_numbers():
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    assert console.Lasting(lambda: narrow).write("größe") == 5
    assert narrow.buffer.getvalue() == rb"gr\xf6\xdfe"


def test_warnings_and_tracebacks_of_a_process_are_shown(monkeypatch, capsys):
    for module, name in ((sys, "excepthook"), (warnings, "formatwarning"), (sys, "stdout"), (sys, "stderr")):
        monkeypatch.setattr(module, name, getattr(module, name))
    console.outlast()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        sys.stderr.write(warnings.formatwarning(TITLE, UserWarning, "f.py", 1))
    try:
        raise KeyError(TITLE)
    except KeyError:
        sys.excepthook(*sys.exc_info())
    try:
        raise RuntimeError(TITLE)
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    written = capsys.readouterr().err
    assert written.count(SHOWN) == 3 and "\x1b" not in written and "RuntimeError" in written
