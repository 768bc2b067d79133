"""Every change of the file system under a directory, counted as it is about to happen, in all processes of a run.

Python announces what it does to files (an audit hook: open, os.rename, os.remove, os.mkdir ...). torch and safetensors
write from C++ and Rust, which announces nothing, so their functions are wrapped. Processes that the run starts count
with it through `boot/sitecustomize.py`.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "RLHF_FAST_TRUST"  # of the environment: what a child process of a run has to watch
WHOLE, TORN = "whole", "torn"  # a moment before a file is opened or after a save; a file that has only begun
_ROOMS = {"os.rename": 2, "os.remove": 1, "os.mkdir": 2, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.truncate": 1}


class Watch:
    """Calls act(number, what, path, finish) before each mutation, numbered from 1 through all processes.

    root: the directory that counts. ledger: a file that grows by a line for each mutation.
    finish(): leaves the file as a crash in the middle of its writing would; None where nothing is written.
    """

    def __init__(self, root: Path, ledger: Path, act: Callable[[int, str, str, Any], None]) -> None:
        self.root, self.act, self.inside = f"{os.path.realpath(root)}/", act, False
        ledger.parent.mkdir(parents=True, exist_ok=True)
        self.ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.count = os.open(f"{ledger}.count", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self.wrapped: set[str] = set()
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.inside:
            return
        if event == "open":
            path, mode, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR) and isinstance(path, str | bytes):
                self.mutation("append" if flags & os.O_APPEND or not flags & os.O_TRUNC else "write", path, -1)
        elif event in _ROOMS:
            where = arguments[_ROOMS[event]] if len(arguments) > _ROOMS[event] else -1
            self.mutation(event.removeprefix("os."), arguments[0], where)

    def mutation(self, what: str, path: Any, directory: Any, write: Callable[[], Any] | None = None) -> Any:
        """Numbers one mutation; `write` does it where the mutation is a save that announces nothing itself."""
        self.inside = True
        try:
            name = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
            if isinstance(directory, int) and directory >= 0:
                name = os.path.join(os.readlink(f"/proc/self/fd/{directory}"), name)
            parent, last = os.path.split(os.path.abspath(name))
            name = os.path.join(os.path.realpath(parent), last)
            if not f"{name}/".startswith(self.root):
                return write() if write else None
            self.wrap()
            for moment in (WHOLE, TORN) if what in ("write", "append", "save") else (WHOLE,):
                os.write(self.count, b".")
                number = os.lseek(self.count, 0, os.SEEK_CUR)
                os.write(self.ledger, f"{number} {moment} {what} {name}\n".encode())
                if moment == WHOLE:
                    self.act(number, what, name, None)
                elif what == "save":
                    assert write is not None
                    done = write()
                    self.act(number, what, name, lambda: os.truncate(name, os.path.getsize(name) // 2))
                    return done
                else:
                    self.act(number, what, name, lambda: _begin(name, empty=what == "write"))
            return None
        finally:
            self.inside = False

    def wrap(self) -> None:
        """Wraps the savers of torch and safetensors, once they are imported."""
        for module, function, place in (("torch", "save", 1), ("safetensors.torch", "serialize_file", 1)):
            loaded = sys.modules.get(module)
            if loaded is None or module in self.wrapped or not hasattr(loaded, function):
                continue
            self.wrapped.add(module)
            setattr(loaded, function, self.saver(getattr(loaded, function), place))

    def saver(self, original: Callable[..., Any], place: int) -> Callable[..., Any]:
        def save(*arguments: Any, **options: Any) -> Any:
            path = arguments[place]
            if self.inside or not isinstance(path, str | os.PathLike):
                return original(*arguments, **options)
            return self.mutation("save", path, -1, lambda: original(*arguments, **options))

        return save


def _begin(name: str, *, empty: bool) -> None:
    os.close(os.open(name, os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if empty else 0), 0o644))


def count(root: Path, ledger: Path) -> Callable[[], None]:
    """Begins to count in this process and in the processes that it starts."""
    return lambda: _install({"root": str(root), "ledger": str(ledger), "at": 0, "group": False})


def crash(root: Path, ledger: Path, at: int, *, group: bool = True) -> Callable[[], None]:
    """Ends this process, or all of its group, by SIGKILL at mutation number `at`."""
    return lambda: _install({"root": str(root), "ledger": str(ledger), "at": at, "group": group})


def _install(wanted: dict[str, Any]) -> None:
    def act(number: int, what: str, path: str, finish: Callable[[], None] | None) -> None:
        if number == wanted["at"]:
            if finish is not None:
                finish()
            if wanted["group"]:
                os.killpg(0, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    Watch(Path(wanted["root"]), Path(wanted["ledger"]), act)
    boot = Path(__file__).parent / "boot"
    paths = [str(boot), str(boot.parents[2]), os.environ.get("PYTHONPATH", "")]
    os.environ |= {VARIABLE: json.dumps(wanted), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def join() -> None:
    """In a process that a watched run has started: watches too."""
    if wanted := os.environ.get(VARIABLE):
        _install(json.loads(wanted))


def number_of(ledger: Path) -> int:
    """How many mutations a ledger holds."""
    return os.path.getsize(f"{ledger}.count") if os.path.exists(f"{ledger}.count") else 0
