"""Several processes on one machine: starting them as torchrun does, and the stages that a process trains in a test.

python -m tests.support.ranks JOBS.json    trains every job, a list of [stage, options]
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
Job = tuple[str, dict[str, Any]]  # the name of a stage, and the fields of its config


def start(size: int, *command: str, **environment: str) -> list[subprocess.Popen[str]]:
    """Starts `python COMMAND` in `size` processes with the variables of a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def launch(size: int, *command: str, **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Runs `python COMMAND` in `size` processes; the results by rank."""
    return results_of(start(size, *command, **environment))


def results_of(running: list[subprocess.Popen[str]]) -> list[subprocess.CompletedProcess[str]]:
    """Waits for the processes; their results by rank."""
    results = []
    for process in running:
        out, err = process.communicate(timeout=240)
        results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return results


def train(jobs: list[Job]) -> None:
    """Trains one stage after the other in this process."""
    from rlhf_fast import methods

    for stage, options in jobs:
        row = methods.STAGES[stage]
        methods.load(row.train)(methods.load(row.config)(**options))


def train_in(size: int, jobs: list[Job], directory: Path) -> list[subprocess.CompletedProcess[str]]:
    """Trains the jobs in `size` processes."""
    path = directory / f"jobs_{size}.json"
    path.write_text(json.dumps(jobs))
    return launch(size, "-m", "tests.support.ranks", str(path))


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    train(json.loads(Path(sys.argv[1]).read_text()))
