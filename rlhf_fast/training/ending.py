"""How a process ends on a signal: a run finishes its step, writes a checkpoint, says how to go on.

A scheduler stops a job by SIGTERM or SIGHUP and kills it some 30 seconds later. Inside `signals` a run therefore ends
after the step that it is in. A step that takes longer than `GRACE` is broken off, and the run keeps what it can. Work
that is no run, such as loading a model, ends at once.

    with signals():
        sft.train(config)  # raises Ended, a SystemExit with the code 143 (SIGTERM) or 129 (SIGHUP)

SIGINT (Ctrl-C) ends a run at once, by Python's KeyboardInterrupt; a second SIGINT ends the process without a word. A
signal that the process was started to ignore, as nohup does with SIGHUP, stays ignored.
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

GRACE = 20.0  # seconds that a step may still take
REACTION = 5.0  # seconds that the breaking off may take, such as a kernel that Python cannot interrupt
CHILDREN = 40.0  # seconds that the processes of a study or a comparison may take to end
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Ended(SystemExit):
    """A signal has ended the process. line: what is kept and how to go on; "" where nobody has said it yet."""

    def __init__(self, signum: int, line: str = "") -> None:
        super().__init__(128 + signum)
        self.signum, self.line = signum, line

    def __reduce__(self) -> tuple[Any, ...]:
        return Ended, (self.signum, self.line)

    def __str__(self) -> str:
        return self.line or f"ended by {name(self.signum)}"


def name(number: int) -> str:
    """SIGTERM, SIGHUP or SIGINT."""
    return signal.Signals(number).name


class _State:
    """What this process knows of its end."""

    signum: int | None = None  # the first signal that came
    heard: int | None = None  # the first signal that came to any process of the run, as all of them know
    kept: Callable[[], str] | None = None  # of the run that is in a step: says what is on the disk
    broken_off = threading.Event()  # Python has broken off a step that took too long
    over = threading.Event()  # the run has reached the end of its step


_state = _State()


@contextmanager
def signals() -> Iterator[None]:
    """Inside, SIGTERM, SIGHUP and a second SIGINT end the process as this module says. Outside the main thread it does
    nothing, because Python gives signals to the main thread alone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (*_SIGNALS, signal.SIGINT)}
    _state.signum = _state.heard = None
    for number in _SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, _end)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> int | None:
    """The signal that has asked this process to end."""
    return _state.signum


def hear(signals: Iterable[int | None]) -> None:
    """Notes the signals that have asked the processes of the run to end, by process; all processes note the same."""
    _state.heard = next((signum for signum in (_state.heard, *signals) if signum is not None), None)


def heard() -> int | None:
    """The signal that has asked a process of the run to end, as far as all processes know of it."""
    return _state.heard


@contextmanager
def after_the_step(kept: Callable[[], str]) -> Iterator[None]:
    """Inside, a signal is only noted, for `asked`. kept: says what is on the disk, for a step that cannot be broken
    off."""
    _state.kept = kept
    _state.over.clear()
    _state.broken_off.clear()
    try:
        yield
    finally:
        _state.kept = None
        _state.over.set()


def reached() -> None:
    """The step has ended in time, so that writing the checkpoint is not broken off."""
    _state.over.set()


def _interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


def _end(number: int, frame: FrameType | None) -> None:
    first, _state.signum = _state.signum is None, _state.signum or number
    if _state.kept is None:
        if first:  # a second signal, as a scheduler sends it to a group, must not disturb the end
            raise Ended(number)
    elif first:
        threading.Thread(target=_break_off, args=(number, _state.kept), daemon=True).start()
    elif _state.broken_off.is_set():
        _state.broken_off.clear()
        raise Ended(number)


def _break_off(number: int, kept: Callable[[], str]) -> None:
    """Ends the step that the main thread is in, and the process where Python does not get the main thread back."""
    if _state.over.wait(GRACE):
        return
    _state.broken_off.set()
    main = threading.main_thread().ident
    assert main is not None  # it has started
    signal.pthread_kill(main, number)  # the handler raises Ended there
    end = time.monotonic() + REACTION
    while time.monotonic() < end:
        if not _state.broken_off.is_set() or _state.over.wait(0.1):
            return
    print(f"rlhf-fast: {kept()}", file=sys.stderr, flush=True)
    os._exit(128 + number)


def end_children(number: int) -> None:
    """Sends the signal to the processes that `multiprocessing` has started here, and waits for their end."""
    children = multiprocessing.active_children()
    for child in children:
        with suppress(OSError):  # it has ended by itself
            os.kill(child.pid or 0, number)
    end = time.monotonic() + CHILDREN
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
