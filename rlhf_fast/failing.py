"""What the processes of a run tell each other where one of them fails, so that its error is printed once.

They tell it by the store in which they have met. Process 0 keeps the store, or torchrun. A process that was killed
tells nothing: it is found because nobody answers at its address (`rlhf_fast.presence`).
"""

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from rlhf_fast.presence import Address, Presence, answers

_NOTICE = 3.0  # seconds in which the end of a process is noticed
_OFTEN = 0.1  # seconds between two looks at the others
_PARTING = 10.0  # seconds that a failed process 0 keeps the store, so that the others see who has failed
_ENDING = "rlhf_fast/ending"  # key in the store of every process that ends by an error
_PARTED = "rlhf_fast/parted"  # key of every such process once it asks the store nothing more
_FAILED = "rlhf_fast/failed"  # counts the processes that have failed

_store: Any = None
_store_is_gone = False
_present: tuple[Presence | None, list[Address | None]] | None = None  # this process, and the addresses of all
_failing = False  # whether this process ends by an error


def ask(store: Any) -> None:
    """From now on the processes tell each other by this store, torch's."""
    global _store
    _store = store


def watch(gather: Callable[[Any], list[Any]]) -> None:
    """From now on the end of another process is noticed. gather: gives every process the values of all."""
    global _present
    try:
        own = Presence(os.environ["MASTER_ADDR"])
    except OSError:  # no port to be had: a death is then said without the number of the process
        own = None
    _present = own, gather(own and own.address)


def first_to_fail() -> bool:
    """Whether this process is the first that fails. The others mostly fail because this process is gone.

    Where the processes have not joined yet, all of them fail in the same way, and the first process says so.
    """
    if _store is None:
        return os.environ.get("RANK", "0") == "0"
    _say_ending()
    failed = _ask(lambda: _store.add(_FAILED, 1))
    # Without a store, process 0 was killed: where it fails, it keeps the store for the others.
    return os.environ["RANK"] == "1" if failed is None else failed == 1


def flag(name: str) -> None:
    """Tells all processes of something under this name, without waiting for them; `flagged` finds it."""
    _ask(lambda: _store.add(f"rlhf_fast/{name}", 1))


def flagged(name: str) -> bool:
    """Whether a process has raised the flag of this name, or is gone with the store that keeps it.

    There are several processes, and they have joined.
    """
    raised = _ask(lambda: _store.add(f"rlhf_fast/{name}", 0))
    return raised is None or raised > 0


def gone(error: BaseException) -> bool:
    """Whether an error says that another process of the run has ended, or does not answer."""
    said = isinstance(error, RuntimeError) and re.search(r"\b(gloo|NCCL)\b", str(error), re.IGNORECASE) is not None
    return said or isinstance(error, dist.DistNetworkError)


def lost(error: BaseException) -> ConnectionError:
    """An error that is `gone`, as one sentence."""
    said, ended = str(error).partition("\n")[0], _ended()
    if ended:
        who = f"process {' and process '.join(map(str, ended))} of {os.environ['WORLD_SIZE']} has ended"
    else:
        who = "another process of the run has ended, or does not answer"
    return ConnectionError(f"{who} ({said:.200})")


def says_lost(text: str) -> bool:
    """Whether the text holds an error that `lost` has made."""
    return (
        re.search(r"(another process of the run|process \d+( and process \d+)* of \d+) has ended\b", text) is not None
    )


def part() -> None:
    """Where this process ends by an error: process 0 stays until the others have learnt from the store who failed."""
    if not _failing:
        return
    _say(_PARTED)
    if _present is None or os.environ["RANK"] != "0" or _launcher_keeps_the_store():
        return
    _hang_up({address[0] for address in _present[1] if address})
    end = time.monotonic() + _PARTING
    while any(answers(address) and not _known(f"{_PARTED}/{rank}") for rank, address in [*enumerate(_present[1])][1:]):
        if time.monotonic() > end:
            break
        time.sleep(_OFTEN)


def _hang_up(hosts: set[str]) -> None:
    """Ends the connections to the processes on these hosts but for the store's, so that nobody waits for this process.

    A process group that FSDP2 has used keeps its connections until its process ends, destroyed or not.
    """
    port = int(os.environ["MASTER_PORT"])
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        with suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:  # OSError: it is no socket
            if one.family in (socket.AF_INET, socket.AF_INET6):
                ends = one.getsockname(), one.getpeername()
                host = ends[1][0].removeprefix("::ffff:")
                if host in hosts and port not in (ends[0][1], ends[1][1]):
                    one.shutdown(socket.SHUT_RDWR)


def _ended() -> list[int]:
    """The processes that have ended, but for those that have ended because of an error and said so.

    It looks no further where another process has said already what has failed, because nobody prints the answer then.
    """
    if _present is None:
        return []
    _say_ending()
    end = time.monotonic() + _NOTICE
    while not _known(_FAILED):
        silent = [rank for rank, address in enumerate(_present[1]) if not answers(address)]
        if silent or time.monotonic() > end:
            return [rank for rank in silent if not _known(f"{_ENDING}/{rank}")]
        time.sleep(_OFTEN)
    return []


def _say_ending() -> None:
    global _failing
    _failing = True
    _say(_ENDING)


def _say(what: str) -> None:
    _ask(lambda: _store.set(f"{what}/{os.environ['RANK']}", ""))


def _known(key: str) -> bool:
    """Whether the store holds the key; False where the store is gone."""
    return bool(_ask(lambda: _store.check([key])))


def _ask(question: Callable[[], Any]) -> Any:
    """What the store answers, or None where it is gone with process 0. torch prints pages where a question fails."""
    global _store_is_gone
    if _failing and _present is not None and os.environ["RANK"] != "0" and not _launcher_keeps_the_store():
        _store_is_gone = _store_is_gone or not answers(_present[1][0])
    if _store_is_gone:
        return None
    try:
        return question()
    except (RuntimeError, OSError):
        _store_is_gone = True
        return None


def _launcher_keeps_the_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
