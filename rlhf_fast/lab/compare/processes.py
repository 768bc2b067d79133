"""The processes of one compared run: each process of the comparison starts one, and they find each other at a new port.

A process that ends takes the others with it, and a run that does not fit into the memory of one process does not fit.
"""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlhf_fast.data.damage import read_json
from rlhf_fast.data.files import write_json
from rlhf_fast.failing import flag, flagged, says_lost
from rlhf_fast.lab.compare.cells import Cell
from rlhf_fast.ranks import current
from rlhf_fast.training.ending import CHILDREN, Ended


def run_cell(cell: Cell, directory: Path, memory: int | None, resume: bool = False) -> None:
    """Runs one cell in a process of its own. Its output goes to a file; if it fails, the last lines are shown.

    resume: a cell that a signal ended goes on from its checkpoint. With several processes all of them call it, and each
    starts a process of the cell.
    """
    ranks = current()
    number = "" if ranks.first else f"-{ranks.rank}"
    directory.mkdir(parents=True, exist_ok=True)
    config_file, log = directory / f"cell{number}.json", directory / f"output{number}.txt"
    result = directory / f"result{number}.json"
    result.unlink(missing_ok=True)
    write_json(config_file, cell.options | {"output_dir": str(directory), "memory": memory, "resume": resume})
    command = [sys.executable, "-m", "rlhf_fast.lab.compare.cell", cell.method, str(config_file), str(result)]
    port = ranks.gather(_free_port() if ranks.first else 0)[0]
    # the pipe has no content, and its end tells the cell that this process has ended
    options: dict[str, Any] = {"stdin": subprocess.PIPE, "stderr": subprocess.STDOUT, "env": _environment(port)}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, **options) as process:
        broken = f"compare/{directory.name}/{port}"
        code = _wait_for(process, (lambda: flagged(broken)) if ranks.size > 1 else None)
        error = None if code or read_json(result)["ran"] else read_json(result)
        if (code or error) and ranks.size > 1:
            flag(broken)
    said = "\n".join(log.read_text().splitlines()[-20:])
    ended = ranks.gather((code, error, said, str(log)))
    if not ranks.first:
        for file in (result, config_file):
            file.unlink(missing_ok=True)
    failed = [(code, said, log) for code, _, said, log in ended if code]
    unfit = [error for _, error, _, _ in ended if error]
    if unfit and ranks.first:
        write_json(result, unfit[0])
    if failed and not unfit:
        # The others mostly say that this process is gone.
        code, said, log = next((found for found in failed if found[0] > 0 and not says_lost(found[1])), failed[0])
        if ranks.first:
            print(said, file=sys.stderr)
        raise ValueError(f"{cell.name} failed with exit code {code}; its last lines are above, all of them in {log}")


def _environment(port: int) -> dict[str, str]:
    """The variables of a launcher for the processes of a cell, which do not use the launcher's own store."""
    if current().size == 1:
        return {**os.environ}
    kept = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_USE_AGENT_STORE"}
    return kept | {"MASTER_PORT": str(port)}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]


def _wait_for(process: subprocess.Popen, broken: Callable[[], bool] | None) -> int:
    """The exit code of the process. SIGTERM or SIGHUP goes on to the process, which has its time to save.

    After Ctrl-C the process ends with its pipe, because Ctrl-C saves nothing. broken: whether another process of the
    cell has failed; this process then ends too.
    """
    try:
        if broken is None:
            return process.wait()
        while True:
            try:
                return process.wait(1)
            except subprocess.TimeoutExpired:
                if broken():
                    process.kill()
                    return process.wait()
    except Ended as error:
        process.send_signal(error.signum)
        try:
            process.wait(CHILDREN)
        except subprocess.TimeoutExpired:
            process.kill()
        raise
