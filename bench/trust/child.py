"""A try runs in a fork of this process, in which torch and the package are imported already: no try waits for imports.

The fork is safe because this process has one thread. The child has a session of its own, so that a signal to its group
reaches its children and nobody else.
"""

import os
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from bench.trust.kind import Lost

PATIENCE = 180.0  # seconds after which a try hangs
MEMORY = 4 << 30  # bytes of a try; a run that a fault makes grow must not take the machine's memory from others


class Ended(NamedTuple):
    """code: the exit code, or minus the signal that ended the process. output: stdout and stderr together."""

    code: int
    output: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line of the output."""
        lines = self.output.strip().splitlines()
        return lines[-1][:300] if lines else "no output"


class Child:
    """A process that runs `action`; its output goes to the file `log`."""

    def __init__(self, action: Callable[[], int | None], log: Path) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        log.parent.mkdir(parents=True, exist_ok=True)
        log.touch()
        self.log, self.began = log, time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            _become(action, log)
        self._exit = os.pidfd_open(self.pid)

    def signal(self, number: int, *, group: bool = False) -> None:
        """Sends a signal to the process, or to all of its group."""
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, number)

    def ended(self, seconds: float) -> bool:
        """Whether the process has ended; waits so long for it."""
        return bool(select.select([self._exit], [], [], seconds)[0])

    def wait(self, patience: float = PATIENCE) -> Ended:
        """Waits for the end. Raises Lost where the process hangs, after killing it."""
        hung = not self.ended(patience)
        if hung:
            self.signal(signal.SIGKILL, group=True)
        _, status, *_ = os.wait4(self.pid, 0)
        os.close(self._exit)
        self.signal(signal.SIGKILL, group=True)  # whoever it left behind
        output = self.log.read_text(errors="replace")
        if hung:
            raise Lost(f"expected an end, but the process still runs after {patience:.0f} s: {output[-300:]!r}")
        return Ended(os.waitstatus_to_exitcode(status), output, time.monotonic() - self.began)


def run(action: Callable[[], int | None], log: Path, patience: float = PATIENCE) -> Ended:
    """Runs `action` in a fork and waits for its end."""
    return Child(action, log).wait(patience)


def rlhf_fast(arguments: list[str]) -> Callable[[], int]:
    """The command with these arguments, as an action."""

    def action() -> int:
        from rlhf_fast import cli

        sys.argv = ["rlhf-fast", *arguments]
        return cli.main()

    return action


def _become(action: Callable[[], int | None], log: Path) -> None:
    """The life of the child, which never returns."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for stream, (path, flags) in {
            0: (os.devnull, os.O_RDONLY),
            1: (log, os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        }.items():
            os.dup2(os.open(path, flags, 0o644), stream)
        os.dup2(1, 2)
        sys.stdin, sys.stdout, sys.stderr = (
            os.fdopen(stream, mode, buffering=1, closefd=False) for stream, mode in ((0, "r"), (1, "w"), (2, "w"))
        )
        code = action() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
