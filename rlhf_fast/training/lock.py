"""One writer for an output directory, or for a file: a lock that ends with its process.

The lock is flock(2) on a file `.rlhf_fast.lock` in the directory, held from the first look at the directory to the last
rename. The kernel releases the lock when the process ends, however it ends. The file says who holds the lock, and is
gone after an ordinary end. The lock of a file lies beside the file. On a file system without flock a line says so, and
the run goes on.

    with held(config.output_dir):
        ...
"""

import fcntl
import functools
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar, cast

from rlhf_fast.data.damage import writing
from rlhf_fast.data.files import LOCKING, beside, check_name, check_writable, sweep, sweep_file
from rlhf_fast.ranks import current
from rlhf_fast.training.apart import check_apart

NAME = ".rlhf_fast.lock"
_ROOM = 120  # bytes of the longest path in a checkpoint
_held: dict[tuple[str, int], "_Lock"] = {}  # by directory and thread
_followed: set[tuple[str, int]] = set()  # directories whose lock the run's first process holds
Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def held(directory: str | os.PathLike, argument: str = "output_dir") -> Iterator[None]:
    """Inside, this thread alone writes to `directory`, which is made, and in which leftovers of a crash are cleaned up.

    The same thread may enter again.

    Raises ValueError, naming the argument and the holder, where another process or thread writes there. Nothing is
    written then.
    """
    check_name(argument, directory, _ROOM)
    key = _key(directory)
    if key in _held or key in _followed:
        yield
    else:
        path = Path(key[0])
        yield from _hold(key, path / NAME, argument, f"no other run in {path}", lambda: sweep(path))


@contextmanager
def held_file(file: str | os.PathLike, argument: str) -> Iterator[None]:
    """Inside, this thread alone writes the file, whose directory is made. Other files there are anybody's.

    Raises ValueError, naming the argument and the holder, where another process or thread writes the file.
    """
    check_writable(argument, file)
    key = _key(file)
    whole = _key(Path(key[0]).parent)
    if not {key, whole}.isdisjoint((*_held, *_followed)):
        yield
    else:
        path = Path(key[0])
        wanted = f"no other run that writes {path}"
        yield from _hold(key, beside(path, LOCKING), argument, wanted, lambda: sweep_file(path))


def _hold(
    key: tuple[str, int], path: Path, argument: str, wanted: str, clean: Callable[[], None]
) -> Generator[None, None, None]:
    """The inside of `held` and `held_file`. path: of the lock. wanted: what a refusal says was expected."""
    if not current().first:
        yield from _following(key)
        return
    made = _make(path.parent)
    try:
        try:
            own = _held[key] = _lock(path, argument, wanted)
        except ValueError as error:
            current().gather(str(error))
            raise
        current().gather(None)
        try:
            clean()
            yield
        finally:
            if _held.pop(key, None) is own:  # not in a process that was forked inside
                if own.is_at(path):
                    path.unlink()  # before the lock goes, so that nobody else's file is deleted
                else:
                    made.clear()  # somebody else's directories are in their place
                os.close(own.file)
    finally:
        for parent in made:
            with suppress(OSError):  # it is not empty, or gone
                parent.rmdir()


def _following(key: tuple[str, int]) -> Generator[None, None, None]:
    """The inside of `held` in the processes beside the first process of a run, which holds the lock for all of them."""
    if refused := current().gather(None)[0]:
        raise ValueError(refused)
    _followed.add(key)
    try:
        yield
    finally:
        _followed.discard(key)


def writes_alone(field: str) -> Callable[[Function], Function]:
    """Decorates a function of a config: it runs with the lock on the directory that the config's `field` names.

    The function reads nothing in `output_dir`; `apart` says what is checked.
    """

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def alone(config: Any, *arguments: Any, **options: Any) -> Any:
            if field == "output_dir":
                check_apart(config)
            with held(getattr(config, field), field):
                return function(config, *arguments, **options)

        return cast(Function, alone)

    return decorate


def lost(directory: str | os.PathLike) -> bool:
    """Whether a directory that this thread holds was removed, renamed, or replaced by another one."""
    own = _held.get(_key(directory))
    return own is not None and not own.is_at(Path(directory, NAME))


class _Lock:
    """An open and locked file. text: what it says; it names the process, the host, the command and the moment."""

    def __init__(self, file: int) -> None:
        self.file = file
        host = platform.node().replace(" ", "-")
        text = f"{os.getpid()} {host} {shlex.join(sys.argv)}\n{time.time_ns()}\n".encode(errors="replace")
        os.ftruncate(file, 0)
        self.text = text[: os.pwrite(file, text, 0)]  # less where there is little room

    def is_at(self, path: Path) -> bool:
        """Whether the file at `path` is this one, by its text, because some file systems number files anew."""
        try:
            return path.read_bytes() == self.text
        except OSError:
            return False


def _key(directory: str | os.PathLike) -> tuple[str, int]:
    return os.path.abspath(directory), threading.get_ident()


def _lock(path: Path, argument: str, wanted: str) -> _Lock:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = os.read(file, 1000).decode(errors="replace").partition("\n")[0]
            os.close(file)
            pid, host, command = (holder.split(" ", 2) + ["", ""])[:3]
            where = "" if host == platform.node().replace(" ", "-") else f" on {host}"
            raise ValueError(
                f"{argument}: expected {wanted}, but process {pid}{where} writes there: {command}"
            ) from error
        except OSError as error:
            said = f"{argument}: {path.parent} cannot be locked ({error.strerror}); start no second run there"
            print(said, file=sys.stderr)
        with writing(path):
            own = _Lock(file)
        if own.is_at(path):
            return own
        os.close(file)  # the holder deleted this file between our two calls, because it had ended


def _make(directory: Path) -> list[Path]:
    """Makes the directory; returns those that were made, the innermost first."""
    missing = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


def _leave_to_parent() -> None:
    """In a forked child: the lock is the parent's, and must not outlive it."""
    for own in _held.values():
        os.close(own.file)
    _held.clear()


os.register_at_fork(after_in_child=_leave_to_parent)
