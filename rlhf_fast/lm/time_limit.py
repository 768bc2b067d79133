"""A time limit for calls that may never end, such as a user's function or a regular expression of an adapter."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_AGAIN = 1.0  # seconds after which what goes on after its time limit is broken off again


class TooLong(BaseException):
    """Raised inside `time_limit` at the end of the time. No `except Exception` of the called code catches it."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Inside, a signal raises TooLong after so many seconds. It works in the main thread alone, as Python's signals do.

    A signal reaches a regular expression that never ends, which a thread would not.
    """

    def late(number: int, frame: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
