"""Calling a function of the user so that whatever it does is told apart from the run's own faults.

The function may raise any exception, call sys.exit, never return, fork a process that comes back from it, and draw
random numbers. Its name and the line that did it are in what the run says. It draws from random numbers of its own,
which are the same in a run that is resumed; the run's random numbers stay as they were.
"""

import asyncio
import faulthandler
import functools
import inspect
import itertools
import os
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf_fast.lm.time_limit import TooLong, time_limit
from rlhf_fast.training.batches import guest_draws
from rlhf_fast.training.ending import Ended
from rlhf_fast.training.stopped import Stopped

_STUCK = 10.0  # seconds after its time limit after which a function that Python cannot break off ends the process


def call(
    name: str,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    seconds: float | None,
    at_most: int | None = None,
) -> Any:
    """What the function returns; of an `async` function what it gives, of a generator the list.

    name: of the function, for messages. seconds: how long it may take. at_most: scores taken from a generator, which
    may never end.
    Raises Stopped for whatever else the function does. KeyboardInterrupt and `Ended` pass.
    """
    process = os.getpid()
    try:
        with guest_draws(), _limited(name, seconds):
            result = function(**arguments)
            if inspect.isawaitable(result):
                result = _wait_for(result)
            if isinstance(result, Iterator):
                result = list(itertools.islice(result, at_most))
    except BaseException as error:
        if os.getpid() != process:  # sys.exit is how many a forked process ends
            os._exit(_exit_code(error))
        if isinstance(error, KeyboardInterrupt | Ended):
            raise
        raise Stopped(_said(name, function, error, seconds)) from error
    if os.getpid() != process:
        print(f"rlhf-fast: reward {name}: a process that it has forked came back from it", file=sys.stderr, flush=True)
        os._exit(1)
    return result


def described(error: BaseException, function: Callable[..., Any] | None = None) -> str:
    """The exception with the line of the user's file that raised it: "KeyError: 'a' (my.py, line 3)"."""
    frames = traceback.extract_tb(error.__traceback__)
    code = getattr(inspect.unwrap(function), "__code__", None) if function is not None else None
    own = [frame for frame in frames if code is not None and frame.filename == code.co_filename]
    frame = (own or frames)[-1]
    said = " ".join(str(error).split())
    kind = f"{type(error).__name__}{': ' * bool(said)}{said}"
    if isinstance(error, SystemExit):
        kind = f"sys.exit({error.code!r})"
    elif isinstance(error, TooLong):
        kind = ""
    return f"{kind} ({Path(frame.filename).name}, line {frame.lineno})".strip()


def _said(name: str, function: Callable[..., Any], error: BaseException, seconds: float | None) -> str:
    where = described(error, function)
    if isinstance(error, TooLong):
        return f"reward {name} took longer than reward_timeout={seconds:g} seconds {where}"
    return f"reward {name} {'called' if isinstance(error, SystemExit) else 'raised'} {where}"


def _exit_code(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return 1


# ------------------------------------------------------------------------------------------------ time


@contextmanager
def _limited(name: str, seconds: float | None) -> Iterator[None]:
    """`time_limit` with an end for a function that Python cannot break off."""
    if seconds is None:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise ValueError(f"reward_timeout: expected a run in the main thread, where {name} can be broken off")
    faulthandler.dump_traceback_later(seconds + _STUCK, exit=True, file=sys.__stderr__ or sys.stderr)
    try:
        with time_limit(seconds):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


# ------------------------------------------------------------------------------------------------ async functions


def _wait_for(awaitable: Awaitable[Any]) -> Any:
    """The result of an `async` function. All calls share one event loop, because clients of servers keep to theirs."""

    async def result() -> Any:
        return await awaitable

    future = asyncio.run_coroutine_threadsafe(result(), _event_loop())
    try:
        return future.result()
    except BaseException:  # such as an interruption
        future.cancel()
        raise


@functools.cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """A loop in a thread of its own, so that it also runs in a notebook, whose thread has a running loop."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="rewards", daemon=True).start()
    return loop
