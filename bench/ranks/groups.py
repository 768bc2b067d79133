"""The processes of a contender, started with a launcher's variables. A process that waits for its turn sleeps."""

import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench.record import ROOT

_PATIENCE = 30.0  # seconds
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class Contender(NamedTuple):
    """size: processes. threads: of each process. shard: as in the configs."""

    name: str
    size: int
    threads: int
    shard: str = "none"


class Group:
    """The running processes of a contender, for one spec after the other. The first process hears and speaks.

    log: of standard error; each process adds its number.
    """

    def __init__(self, contender: Contender, specs: list[Path], log: Path, device: str) -> None:
        self.name, self._log = contender.name, log
        shared = {name: value for name, value in os.environ.items() if name not in _VARIABLES}
        shared |= {"OMP_NUM_THREADS": str(contender.threads), "TOKENIZERS_PARALLELISM": "false"}
        if device == "cpu":
            shared["CUDA_VISIBLE_DEVICES"] = ""
        if contender.size > 1:
            size = {"WORLD_SIZE": str(contender.size), "LOCAL_WORLD_SIZE": str(contender.size)}
            shared |= {**size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        command = [sys.executable, "-m", "bench.ranks.process", *map(str, specs)]
        self._processes = []
        for rank in range(contender.size):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if contender.size > 1 else {}
            pipe = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
            with log.with_suffix(f".{rank}").open("w") as said:
                running = subprocess.Popen(
                    command, cwd=ROOT, env=shared | own, stdin=pipe, stdout=pipe, stderr=said, text=True
                )
            self._processes.append(running)

    def hear(self) -> dict[str, Any]:
        """The next message. Raises RuntimeError with the end of the logs where the first process has ended."""
        line = self._processes[0].stdout.readline()
        if not line:
            for process in self._processes:  # the others end with the first, and say why
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_PATIENCE)
            self.kill()
            logs = [self._log.with_suffix(f".{rank}").read_text()[-2000:] for rank in range(len(self._processes))]
            raise RuntimeError(f"{self.name} ended early:\n" + "\n".join(logs))
        return json.loads(line)

    def go(self) -> None:
        """Lets the processes make their next turn."""
        self._processes[0].stdin.write("\n")
        self._processes[0].stdin.flush()

    def kill(self) -> None:
        """Stops the processes, whatever they do."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
