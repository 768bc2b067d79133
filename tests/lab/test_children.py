"""A signal that ends a study or a comparison goes on to its processes, which save before they end."""

import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_fast.lab.compare import processes
from rlhf_fast.lab.study import runs
from rlhf_fast.training import ending
from tests.support.forked import Forked

CHILD = """
import signal, sys, time
def end(number, frame):
    open(sys.argv[1] + "/ended", "w").write(str(number))
    sys.exit(7)
for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, end)
open(sys.argv[1] + "/begun", "w")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_comparison_waits_for_its_cell(number, tmp_path):
    def run() -> int:
        with ending.signals():
            processes._wait_for(subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)]), None)
        return 0

    parent = Forked(run, tmp_path / "said")
    parent.until((tmp_path / "begun").exists)
    parent.send(number)
    assert parent.code() == 128 + number
    assert (tmp_path / "ended").read_text() == str(int(number))


def endless(directory: Path) -> None:
    """A run whose steps never end, as far as a pool of processes is concerned."""
    with ending.after_the_step(lambda: ""):
        print("begun", flush=True)
        while (number := ending.asked()) is None:
            time.sleep(0.01)
    raise ending.Ended(number, f"saved before {ending.name(number)}")


def test_a_study_waits_for_its_runs(tmp_path, monkeypatch):
    fork = multiprocessing.get_context("fork")  # its processes need not load torch again
    monkeypatch.setattr(multiprocessing, "get_context", lambda kind: fork)
    jobs = [runs.Job(f"run {n}", tmp_path / f"log{n}.txt", endless, tmp_path) for n in range(2)]

    def run() -> int:
        with ending.signals():
            runs.run_jobs(jobs, 1)
        return 0

    parent = Forked(run, tmp_path / "said")
    parent.until(lambda: jobs[0].log.exists() and bool(jobs[0].log.read_text()))
    parent.send(signal.SIGTERM)
    assert parent.code(20) == 143
    assert jobs[0].log.read_text() == "begun\nsaved before SIGTERM\n" and not jobs[1].log.exists()
