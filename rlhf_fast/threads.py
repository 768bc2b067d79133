"""How OpenMP's threads wait for each other, and whether the machine has cores for them.

    wait_quietly()  # before torch is loaded, because OpenMP reads its settings once
    crowded(2)      # "2 threads, but other processes leave 0.9 of 2 cores free ...", or ""

A thread that waits at the end of a parallel region spins for a while. On a busy machine the waiting thread thereby
keeps the thread that it waits for from its core, and one step of decoding has hundreds of regions: a rollout beside one
busy process takes up to eight times as long (`python -m bench busy`). Threads that soon sleep take the time that the
other process leaves them.
"""

import os
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

SPINS = {False: "10000", True: "1000"}
"""Whether threads and other processes outnumber the cores -> how often a waiting thread of GNU's OpenMP looks before it
sleeps. 10,000 looks take about half a millisecond, so that threads stay awake from region to region (`bench busy`)."""
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_FEW = 0.3  # seconds under which the use of the cores is not judged
_GLANCE = 0.05  # seconds of the look at the cores before torch is loaded
_SLACK = 0.4  # of a core that threads and other processes may use more than there are


def wait_quietly(environment: MutableMapping[str, str] = os.environ) -> None:
    """Makes OpenMP's threads soon sleep where they wait, unless the environment says how they wait.

    Looks for 0.05 s whether other processes leave a core for each thread. Other OpenMPs than GNU's are told to sleep at
    once. Changes nothing where torch has been loaded, because OpenMP has read its settings then.
    """
    if "torch" in sys.modules or any(name in environment for name in _WAITING):
        return
    began = clocks()
    if began is not None:
        time.sleep(_GLANCE)
    environment.update({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": SPINS[are_busy(began, clocks())]})


def are_busy(since: "Clocks | None", now: "Clocks | None", threads: int | None = None) -> bool:
    """Whether the cores that other processes left free in between are fewer than `threads`, by default OpenMP's.

    True where the system does not say.
    """
    if since is None or now is None:
        return True
    if threads is None:
        threads = int(os.environ.get("OMP_NUM_THREADS") or cores_of_this_process())
    return threads + _others(since, now) > len(_allowed()) + _SLACK


def _allowed() -> set[int]:
    """The numbers of the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


class Clocks(NamedTuple):
    """Seconds of use since the start of the machine or process."""

    wall: float
    cores: float  # of the cores that this process may use, by all processes
    own: float  # CPU time of this process


def clocks(stat: Path = Path("/proc/stat")) -> Clocks | None:
    """The clocks now; None where the system does not say how its cores are used."""
    try:
        lines = [line.split() for line in stat.read_text().splitlines()]
    except OSError:
        return None
    tick, own = os.sysconf("SC_CLK_TCK"), {f"cpu{number}" for number in _allowed()}
    used = 0
    for name, *numbers in lines:
        if name in own:
            user, nice, system, _, _, interrupts, soft = map(int, numbers[:7])
            used += user + nice + system + interrupts + soft
    return Clocks(time.monotonic(), used / tick, time.process_time())


def _others(since: Clocks, now: Clocks) -> float:
    """The cores that other processes used on average."""
    return (now.cores - since.cores - (now.own - since.own)) / (now.wall - since.wall)


_start = clocks()
_said = False


def crowded(threads: int, processes: int = 1, since: Clocks | None = _start, now: Clocks | None = None) -> str:
    """A sentence where threads outnumber the free cores, once in a process; else "".

    threads: of each process. processes: of the run on this machine. since, now: what is judged, from the import of this
    module by default. Where several processes belong to the run, their own use is not told from the others'.
    """
    global _said
    now, cores = now or clocks(), cores_of_this_process()
    if _said or since is None or now is None:
        return ""
    free = float(cores)
    if processes == 1:
        if now.wall - since.wall < _FEW:
            return ""
        free = min(free, len(_allowed()) - max(0.0, _others(since, now)))
    if threads * processes <= free + 0.5:
        return ""
    _said = True
    if processes > 1:
        mine = f"{processes} processes of {threads} threads each, but there are {cores} cores"
    else:
        mine = f"{threads} threads, but other processes leave {max(0.0, free):.1f} of {cores} cores free"
    fewer = max(1, int((free + 0.5) / processes))
    advice = f"OMP_NUM_THREADS={fewer} sets fewer threads" if fewer < threads else "expect longer steps"
    return f"{mine}; {advice}"


def cores_of_this_process(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use at once: those of its affinity, or of its container's quota if it is less."""
    cores = len(_allowed())
    try:
        most, period = quota.read_text().split()
        return cores if most == "max" else max(1, min(cores, round(int(most) / int(period))))
    except (OSError, ValueError):
        return cores
