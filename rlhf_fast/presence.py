"""How the processes of a run find each other, and which of them still live.

    token = meet(store, rank, size)  # the same in all processes that a launcher has started together
    own = Presence(near="10.0.0.1")  # its address goes to the other processes
    answers(address)

Each process listens at a port, where nobody answers once it has ended. The kernel answers for a process that computes,
so that nothing has to run in it.
"""

import os
import socket
import time
import uuid
from contextlib import suppress
from typing import Any

Address = tuple[str, int]

_PATIENCE = 2.0  # seconds that another machine may take to answer
_BACKLOG = 4096  # calls that the kernel answers; nobody takes them up
_OFTEN = 0.01  # seconds between two looks at who has come


def meet(store: Any, rank: int, size: int) -> str:
    """A token that the processes of this start have in common, and no processes of an earlier start.

    torchrun starts the processes again where one has ended (--max-restarts). The store is the old one then, and holds
    what the old processes have written, such as their addresses. Process 0 answers everybody who has come under a name
    that nobody else has.
    store: torch's, with set, get, check and wait.
    """
    if rank > 0:
        name = uuid.uuid4().hex
        store.set(f"rlhf_fast/come/{rank}", name)
        store.wait([f"rlhf_fast/welcome/{name}"])
        token = store.get(f"rlhf_fast/welcome/{name}").decode()
        store.set(f"{token}/here/{rank}", "")
        return token
    token, away = uuid.uuid4().hex, set(range(1, size))
    while away:
        for other in away.copy():
            if store.check([f"rlhf_fast/come/{other}"]):
                store.set(f"rlhf_fast/welcome/{store.get(f'rlhf_fast/come/{other}').decode()}", token)
            if store.check([f"{token}/here/{other}"]):
                away.discard(other)
        time.sleep(_OFTEN)
    return token


class Presence:
    """This process as others can see it, until it ends. near: a host that the other processes reach, or are on.

    A forked process, such as a reward function's, does not answer for this process.
    """

    def __init__(self, near: str) -> None:
        family, kind, _, _, place = socket.getaddrinfo(near, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as route:
            route.connect(place)  # sends nothing; says by which address this machine reaches the host
            host = route.getsockname()[0]
        self._socket = socket.create_server((host, 0), family=family, backlog=_BACKLOG)
        self.address: Address = self._socket.getsockname()[:2]
        os.register_at_fork(after_in_child=self._socket.close)


def answers(address: Address | None) -> bool:
    """Whether the process with this address lives. One without an address is taken to live."""
    if address is None:
        return True
    with suppress(OSError), socket.create_connection(address, _PATIENCE):
        return True
    return False
