"""Commands in a process of their own that is forked from the tests', so that it need not load torch again."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from rlhf_fast import cli


class Forked:
    """A process that calls `function` and exits with the code that it returns.

    output: file for what the process prints. console: descriptor that standard output and error write to instead.
    """

    def __init__(self, function: Callable[[], int], output: Path, console: int | None = None) -> None:
        self.output = output
        self.pid = os.fork()
        if not self.pid:
            self._run(function, console)

    def _run(self, function: Callable[[], int], console: int | None) -> None:
        code = 1
        try:
            for number in (signal.SIGTERM, signal.SIGHUP):  # nohup and shells in the background have them ignored
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)  # a forked process has none of the threads that OpenMP has started
            target = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if console is None else console
            for descriptor in (1, 2):
                os.dup2(target, descriptor)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1) for n in (1, 2))
            code = function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def until(self, holds: Callable[[], bool], seconds: float = 60.0) -> None:
        """Waits until `holds()`."""
        end = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < end, self.said
            assert os.waitpid(self.pid, os.WNOHANG) == (0, 0), self.said
            time.sleep(0.01)

    def send(self, number: int) -> None:
        """Sends the process a signal."""
        os.kill(self.pid, number)

    def code(self, seconds: float = 60.0) -> int:
        """The exit code, or the signal that killed the process as a negative number; waits for the end."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.send(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still running after {seconds} s: {self.said}")

    @property
    def said(self) -> str:
        """What the process has printed so far."""
        return self.output.read_text() if self.output.exists() else ""


def command(*arguments: str) -> int:
    """`rlhf-fast ARGUMENTS`, as the process of the command runs it."""
    sys.argv = ["rlhf-fast", *arguments]
    return cli.main()
