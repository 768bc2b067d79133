"""What a reward function may do: raise, call sys.exit, hang, fork, start processes, draw random numbers."""

import os
import random
import re
import signal
import sys
import threading
import time

import numpy as np
import pytest
import torch

from rlhf_fast.config import PPOConfig
from rlhf_fast.stages import ppo
from rlhf_fast.training import reward_files
from rlhf_fast.training.batches import seed_everything
from rlhf_fast.training.ending import Ended
from rlhf_fast.training.reward_functions import FunctionReward, load_function
from rlhf_fast.training.stopped import Stopped
from tests.support.forked import Forked
from tests.support.stages import numbers, stage_config

TEXTS = {"completions": lambda: ["a", "bb"]}


@pytest.fixture
def reward(tmp_path, monkeypatch):
    """Makes a reward of a file with this body of `score`."""
    monkeypatch.setattr("sys.path", [*sys.path])

    def make(body: str, timeout: float | None = None, head: str = "") -> FunctionReward:
        path = tmp_path / f"r{len(list(tmp_path.iterdir()))}.py"
        lines = "".join(f"    {line}\n" for line in body.splitlines())
        modules = ["os", "random", "re", "sys", "time"] + ["torch"] * ("torch" in body)
        path.write_text(f"import {', '.join(modules)}\n{head}\ndef score(completions):\n{lines}")
        return FunctionReward(f"{path}:score", timeout)

    return make


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("sys.exit(0)", r"called sys.exit\(0\) \(r0.py, line 4\)"),
        ("sys.exit('done')", r"called sys.exit\('done'\) \(r0.py, line 4\)"),
        ("raise ValueError('boom')", r"raised ValueError: boom \(r0.py, line 4\)"),
        ("open('/no/such/file')", r"raised FileNotFoundError: .*'/no/such/file' \(r0.py, line 4\)"),
        ("raise GeneratorExit", r"raised GeneratorExit \(r0.py, line 4\)"),
        ("return (1 / (len(c) - 1) for c in completions)", r"raised ZeroDivisionError: .* \(r0.py, line 4\)"),
        ("return str(10**5000)", r"raised ValueError: Exceeds the limit .* \(r0.py, line 4\)"),
    ],
)
def test_what_it_raises_is_said_to_be_its_own(body, said, reward):
    with pytest.raises(Stopped, match=f"^reward .*r0.py:score {said}$"):
        reward(body)(TEXTS, 2)


def test_what_ends_the_run_passes(reward):
    def ends(completions):
        raise Ended(signal.SIGTERM)

    with pytest.raises(Ended):
        FunctionReward(ends)(TEXTS, 2)
    with pytest.raises(KeyboardInterrupt):
        reward("raise KeyboardInterrupt")(TEXTS, 2)


def test_a_file_that_calls_exit(tmp_path):
    (tmp_path / "leaves.py").write_text("import sys\nsys.exit(0)\n")
    with pytest.raises(ValueError, match=r"^reward: expected .*leaves.py to load, got sys.exit\(0\) \(leaves.py"):
        load_function(f"{tmp_path}/leaves.py:score")


@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "while True: pass",
        "re.match('(a+)+$', 'a' * 40 + 'b')",
        "while True:\n    try: time.sleep(60)\n    except Exception: pass",
    ],
)
def test_a_function_that_hangs(body, reward):
    began = time.monotonic()
    with pytest.raises(Stopped, match=r"^reward .*:score took longer than reward_timeout=0.2 seconds \(r0.py, line"):
        reward(body, timeout=0.2)(TEXTS, 2)
    assert time.monotonic() - began < 5
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0) and signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_an_async_function_that_hangs(reward):
    body = "return sleepy()"
    head = "import asyncio\nasync def sleepy():\n    await asyncio.sleep(60)"
    with pytest.raises(Stopped, match="took longer than reward_timeout=0.2 seconds"):
        reward(body, timeout=0.2, head=head)(TEXTS, 2)


def test_a_function_within_its_time(reward):
    assert reward("return [1.0, 2.0]", timeout=60)(TEXTS, 2) == [1.0, 2.0]
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_time_limit_needs_the_main_thread(reward):
    found = []

    def run():
        try:
            reward("return [1.0, 2.0]", timeout=60)(TEXTS, 2)
        except Stopped as error:
            found.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert re.search("reward_timeout: expected a run in the main thread", found[0])


def test_a_process_that_python_cannot_break_off(reward, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_fast.training.reward_calls._STUCK", 0.1)
    hangs = reward("import threading, signal\nsignal.pthread_sigmask(0, {14})\ntime.sleep(60)", timeout=0.1)
    process = Forked(lambda: hangs(TEXTS, 2) and 0, tmp_path / "said")
    assert process.code(20) == 1
    assert "Timeout" in process.said and "line 6 in score" in process.said


@pytest.mark.parametrize("body", ["os.fork()\nreturn [1.0, 2.0]", "os.fork() or sys.exit(0)\nreturn [1.0, 2.0]"])
def test_a_fork_that_comes_back_ends(body, reward, tmp_path):
    """Only one process goes on with the run."""

    def run() -> int:
        assert reward(body)(TEXTS, 2) == [1.0, 2.0]
        with (tmp_path / "went_on").open("a") as file:
            file.write("x")
        os.wait()
        return 0

    process = Forked(run, tmp_path / "said")
    assert process.code(20) == 0 and (tmp_path / "went_on").read_text() == "x"
    came_back = "sys.exit" not in body
    assert ("a process that it has forked came back from it\n" in process.said) == came_back


def test_processes_that_it_starts_find_its_file(reward):
    """They import the function's module by its name."""
    head = "import multiprocessing\ndef length(text):\n    return float(len(text))"
    pooled = "with multiprocessing.get_context('spawn').Pool(1) as pool:\n    return pool.map(length, completions)"
    made = reward(pooled, timeout=60, head=head)
    assert made(TEXTS, 2) == [1.0, 2.0]
    name = made.function.__module__
    assert reward_files._Finder.find_spec(name, None).origin == made.name.partition(":")[0]


def test_its_random_numbers_are_its_own(reward):
    """They leave the run's alone, differ from call to call, and are the same in a run that is resumed."""
    draws = reward("return [torch.rand(()).item(), random.random()]")
    drawn = []
    for _ in range(2):
        seed_everything(0, 7)
        before = torch.get_rng_state()
        drawn.append([draws(TEXTS, 2), draws(TEXTS, 2)])
        assert torch.equal(before, torch.get_rng_state())
    assert drawn[0] == drawn[1] and len({number for pair in drawn[0] for number in pair}) == 4
    random.seed(0)
    np.random.seed(0)


def test_its_random_numbers_do_not_change_the_minibatches(files, tiny_model, tmp_path):
    def plain(completions):
        return [float(len(text)) for text in completions]

    def drawing(completions):
        torch.rand(3)
        return plain(completions)

    for name, function in (("a", plain), ("b", drawing)):
        options = {"steps": 2, "minibatches": 2, "reward": function}
        ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path / name, **options))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")
