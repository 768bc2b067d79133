"""How threads wait is settled before torch is loaded, and too few free cores are said once."""

import os
import subprocess
import sys

import pytest

from rlhf_fast import threads
from rlhf_fast.threads import Clocks, are_busy, cores_of_this_process, crowded, wait_quietly


@pytest.fixture(autouse=True)
def unsaid(monkeypatch):
    monkeypatch.setattr(threads, "_said", False)
    monkeypatch.setattr(threads, "_allowed", lambda: {0, 1})
    monkeypatch.setattr(threads, "cores_of_this_process", lambda: 2)


@pytest.mark.parametrize(
    ("others", "count", "said"),
    [
        (0.0, 2, ""),
        (0.4, 2, ""),  # half a core more than there are threads for is not worth a sentence
        (0.9, 2, "2 threads, but other processes leave 1.1 of 2 cores free; OMP_NUM_THREADS=1 sets fewer threads"),
        (1.4, 1, ""),
        (2.0, 1, "1 threads, but other processes leave 0.0 of 2 cores free; expect longer steps"),
    ],
)
def test_busy_cores_are_said(others, count, said):
    """Over 10 seconds this process used 7 of CPU time, the others `others` cores."""
    found = crowded(count, since=Clocks(100, 50, 3), now=Clocks(110, 50 + 7 + 10 * others, 10))
    assert found == said


def test_it_is_said_once():
    since, now = Clocks(0, 0, 0), Clocks(10, 20, 0)
    assert crowded(2, since=since, now=now)
    assert crowded(2, since=since, now=now) == ""


def test_a_moment_is_not_judged():
    assert crowded(2, since=Clocks(0, 0, 0), now=Clocks(0.2, 0.4, 0)) == ""


def test_processes_of_a_run_are_counted_and_not_measured():
    same = Clocks(0, 0, 0)
    assert crowded(1, 2, since=same, now=same) == ""
    said = "2 processes of 2 threads each, but there are 2 cores; OMP_NUM_THREADS=1 sets fewer threads"
    assert crowded(2, 2, since=same, now=same) == said


def test_the_quota_of_a_container_bounds_the_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(8)))
    file = tmp_path / "cpu.max"
    for text, cores in (("250000 100000\n", 2), ("max 100000\n", 8), ("50000 100000\n", 1)):
        file.write_text(text)
        assert cores_of_this_process(file) == cores
    assert cores_of_this_process(tmp_path / "missing") == 8


def test_the_environment_is_settled_before_torch_and_not_against_the_user(monkeypatch):
    environment: dict[str, str] = {}
    wait_quietly(environment)
    assert environment == {}  # torch is loaded here
    monkeypatch.delitem(sys.modules, "torch")
    for busy, spins in ((False, "10000"), (True, "1000")):
        monkeypatch.setattr(threads, "are_busy", lambda since, now, busy=busy: busy)
        environment.clear()
        wait_quietly(environment)
        assert environment == {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": spins}
    own = {"OMP_WAIT_POLICY": "active"}
    wait_quietly(own)
    assert own == {"OMP_WAIT_POLICY": "active"}


def test_cores_that_others_use_are_seen(monkeypatch):
    monkeypatch.setattr(threads, "_allowed", lambda: set(range(8)))
    monkeypatch.setattr(threads, "cores_of_this_process", lambda: 8)
    began, a_little, one = Clocks(10.0, 50.0, 1.0), Clocks(10.1, 50.12, 1.09), Clocks(10.1, 50.15, 1.05)
    assert not are_busy(began, a_little, 8)  # others used 0.03 s of 0.1 s
    assert are_busy(began, one, 8) and not are_busy(began, one, 7)
    assert are_busy(None, began, 1) and are_busy(began, None, 1)
    for said, busy in (("7", False), ("8", True), ("", True)):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert are_busy(began, one) == busy


def test_the_command_settles_it():
    """The setting is there when the command's module loads, and torch has not been loaded by then."""
    code = (
        "import os, sys; sys.argv = ['rlhf-fast', '--version']\n"
        "from rlhf_fast.__main__ import main\n"
        "assert 'torch' not in sys.modules; main(); print(os.environ['OMP_WAIT_POLICY'])"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_WAIT", "GOMP_"))}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=clean)
    assert ran.returncode == 0 and ran.stdout.splitlines()[-1] == "passive", ran.stderr
