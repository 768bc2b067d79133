"""What goes to the console: control characters are shown and never sent, and a console that is gone ends nothing.

A row of data, an exception or a path may hold characters that a terminal obeys, such as those that name its window.
`shown` writes them as text. A pipe whose reader has ended, a full disk and a closed terminal raise an exception at
every print; `Lasting` streams drop this text instead, because the console is for the eye and the files are the record.
"""

import atexit
import io
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO

from rich.console import Console

# Control characters but the ends of lines and tabs, marks that turn the direction of text, halves of an emoji.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_LOST = (OSError, ValueError)  # ValueError: the file is closed


def shown(text: str) -> str:
    r"""The text with its control characters as Python writes them: the character ESC becomes the four letters \x1b."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class Lasting(io.TextIOBase):
    """A text stream that drops what the stream behind it does not take. stream: gives the stream behind it."""

    def __init__(self, stream: Callable[[], TextIO]) -> None:
        self._stream = stream

    def write(self, text: str, /) -> int:
        """Writes the text, and returns its length in any case."""
        with suppress(*_LOST):
            stream = self._stream()
            try:
                stream.write(text)
            except UnicodeEncodeError as error:
                stream.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flushes the stream behind it where that goes."""
        with suppress(*_LOST):
            self._stream().flush()

    def isatty(self) -> bool:
        """Whether the stream behind it is a terminal that is still there."""
        with suppress(*_LOST):
            return self._stream().isatty()
        return False

    def fileno(self) -> int:
        """The descriptor of the stream behind it."""
        return self._stream().fileno()

    @property
    def encoding(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The encoding of the stream behind it."""
        return self._stream().encoding

    @property
    def buffer(self) -> Any:
        """The bytes behind the stream, for programs that write bytes."""
        return self._stream().buffer


def error_console() -> Console:
    """A console on standard error that outlives its reader."""
    # rich puts a stream of its own in the place of standard error while it draws bars.
    return Console(file=Lasting(lambda: getattr(sys.stderr, "rich_proxied_file", sys.stderr)))


def outlast() -> None:
    """For the rest of the process: prints last, and exceptions and warnings are shown without control characters."""
    for number, mode in enumerate((os.O_RDONLY, os.O_WRONLY, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:  # it is closed, and the next file that is opened would get the number and all that is printed
            os.dup2(os.open(os.devnull, mode), number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed when Python started
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  # for the rest of the process
        stream = getattr(sys, name)
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(lambda stream=stream: stream))
            atexit.register(_flush, stream)
    usual = warnings.formatwarning
    warnings.formatwarning = lambda *args, **options: shown(usual(*args, **options))
    sys.excepthook = _show_exception


def _flush(stream: TextIO) -> None:
    """What a stream still holds goes nowhere where it cannot be written: else Python would end with exit code 120."""
    try:
        stream.flush()
    except _LOST:
        with suppress(*_LOST):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _show_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    sys.stderr.write(shown("".join(traceback.format_exception(kind, error, trace))))
