"""How a run ends: signals, a console that is gone, an output_dir that is gone."""

import json
import os
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from rlhf_fast.training import checkpoint, ending
from rlhf_fast.training.metrics import read_metrics
from tests.support.forked import Forked, command
from tests.support.stages import distance, numbers, weights

STEPS = 8
FLAGS = [
    "--batch-size",
    "16",
    "--max-prompt-length",
    "16",
    "--max-response-length",
    "12",
    "--learning-rate",
    "2e-3",
    "--steps",
    str(STEPS),
]

SLOW = """import time
from pathlib import Path
def score(completions):
    seconds, rows = Path(__file__).with_name("pace").read_text().split()
    metrics = Path(__file__).with_name("out") / "metrics.jsonl"
    if metrics.exists() and metrics.read_text().count("\\n") >= int(rows):
        Path(__file__).with_name("asleep").touch()
        time.sleep(float(seconds))
    return [float(len(text)) for text in completions]
"""


class Place(NamedTuple):
    """A directory with a run in out/, a reward function that sleeps, and what the process says."""

    directory: Path
    files: list[str]

    @property
    def out(self) -> Path:
        return self.directory / "out"

    @property
    def rows(self) -> int:
        return len(read_metrics(self.out / "metrics.jsonl"))

    def pace(self, seconds: float, rows: int = 0) -> None:
        """From so many rows of metrics on, the reward function sleeps so many seconds."""
        (self.directory / "pace").write_text(f"{seconds} {rows}")

    def asleep(self) -> bool:
        return (self.directory / "asleep").exists()

    def flags(self, *more: str) -> list[str]:
        reward = f"{self.directory / 'slow.py'}:score"
        return ["rloo", *self.files, *FLAGS, "--reward", reward, "--output-dir", str(self.out), *more]

    def run(self, *more: str, console: int | None = None) -> Forked:
        return Forked(lambda: command(*self.flags(*more)), self.directory / "said", console)


@pytest.fixture(scope="module")
def make(tiny_model, files):
    def place(directory: Path) -> Place:
        (directory / "slow.py").write_text(SLOW)
        made = Place(directory, ["--model", tiny_model, "--train-data", files["prompts"]])
        made.pace(0)
        return made

    return place


@pytest.fixture
def place(make, tmp_path) -> Place:
    return make(tmp_path)


@pytest.fixture(scope="module")
def whole(make, tmp_path_factory) -> Path:
    """What an undisturbed run leaves."""
    place = make(tmp_path_factory.mktemp("whole"))
    assert place.run().code() == 0
    return place.out


def same(a: Path, b: Path) -> bool:
    return distance(weights(a), weights(b)) == 0 and numbers(a) == numbers(b)


def test_sigterm_and_sighup_save_after_the_step(place, whole):
    """Resumed, the run is the undisturbed run. A second signal, as a scheduler sends it to a group, changes nothing."""
    place.pace(0.6)
    for number, code, reached in ((signal.SIGTERM, 143, 2), (signal.SIGHUP, 129, 4)):
        run = place.run(*["--resume"] * (reached > 2))
        run.until(lambda reached=reached: place.rows >= reached)
        run.send(number)
        run.send(number)
        assert run.code() == code
        kept = checkpoint.latest(place.out)
        assert kept is not None and reached <= place.rows == int(kept.name.removeprefix("checkpoint-")) < STEPS
        said = f"rlhf-fast: RLOO: ended by {signal.Signals(number).name}; {kept} is saved, and --resume goes on from "
        assert run.said.splitlines()[-1] == f"{said}there"
    place.pace(0)
    assert place.run("--resume").code() == 0
    assert same(place.out, whole)


@pytest.mark.parametrize("kept", [False, True])
def test_sigint_says_what_is_saved(kept, place):
    place.pace(0.6)
    run = place.run(*["--save-steps", "1"] * kept)
    run.until(lambda: place.rows >= 2)
    run.send(signal.SIGINT)
    assert run.code() == 130
    last = checkpoint.latest(place.out)
    left = "nothing is saved, because save_steps is 0 (SIGTERM saves before it ends a run)"
    left = f"{last} is saved, and --resume goes on from there" if kept else left
    assert run.said.splitlines()[-1] in [f"rlhf-fast: RLOO: interrupted in step {n}; {left}" for n in (2, 3, 4)]
    assert (last is not None) == kept


def test_a_second_sigint_ends_at_once(place, monkeypatch):
    def kept(run):
        (place.directory / "ending").touch()
        time.sleep(60)

    monkeypatch.setattr("rlhf_fast.training.run.Run._kept", kept)
    place.pace(0.6)
    run = place.run("--save-steps", "1")
    run.until(lambda: place.rows >= 2)
    run.send(signal.SIGINT)
    run.until((place.directory / "ending").exists)
    run.send(signal.SIGINT)
    assert run.code(5) == -signal.SIGINT
    checkpoint.load_state(checkpoint.latest(place.out))


@pytest.mark.parametrize("good", [0, 1])
def test_a_long_step_is_broken_off(good, place, whole, monkeypatch):
    """In step 1 nothing is there to save; in step 2 the weights are still those after step 1."""
    monkeypatch.setattr(ending, "GRACE", 0.3)
    place.pace(60, rows=good)
    run = place.run()
    run.until(place.asleep)
    run.send(signal.SIGTERM)
    assert run.code(10) == 143
    kept = place.out / "checkpoint-1"
    left = f"{kept} is saved, and --resume goes on from there" if good else "nothing is saved, because save_steps is 0"
    assert run.said.endswith(f"RLOO: ended by SIGTERM; {left}\n")
    place.pace(0)
    assert place.run(*["--resume"] * good).code() == 0
    assert same(place.out, whole)


def test_a_step_that_python_cannot_break_off(place, monkeypatch):
    monkeypatch.setattr(ending, "GRACE", 0.1)
    monkeypatch.setattr(ending, "REACTION", 0.3)
    monkeypatch.setattr(signal, "pthread_kill", lambda thread, number: None)  # the main thread stays where it is
    place.pace(60)
    run = place.run()
    run.until(place.asleep)
    run.send(signal.SIGTERM)
    assert run.code(5) == 143
    assert run.said.endswith("rlhf-fast: nothing is saved, because save_steps is 0\n")


def test_nohup_stays(place):
    def ignoring() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return command(*place.flags())

    place.pace(0.6)
    run = Forked(ignoring, place.directory / "said")
    run.until(lambda: place.rows >= 1)
    run.send(signal.SIGHUP)
    place.pace(0)
    assert run.code() == 0


@pytest.mark.parametrize("console", ["pipe", "full", "closed"])
def test_a_console_that_is_gone(console, place, whole):
    """A pipe whose reader has ended, a full disk, descriptors that are closed."""
    if console == "pipe":
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open("/dev/full", os.O_WRONLY)

    def run() -> int:
        if console == "closed":
            os.close(1)
            os.close(2)
        code = command(*place.flags())
        print("said at the end", flush=True)
        return code

    assert Forked(run, place.directory / "said", writer).code() == 0
    os.close(writer)
    assert same(place.out, whole)
    assert json.loads((place.out / "run.json").read_text())["steps"] == STEPS


@pytest.mark.parametrize("gone", ["deleted", "renamed", "replaced"])
def test_an_output_directory_that_vanishes(gone, place):
    """The run ends in one line and makes no directory anew. It saves where metrics.jsonl alone is replaced."""
    place.pace(0.6)
    run = place.run()
    run.until(lambda: place.rows >= 2)
    metrics = place.out / "metrics.jsonl"
    if gone == "deleted":
        shutil.rmtree(place.out)
        found = f"{place.out} to stay while the run writes, found no {metrics} (No such file or directory)"
    elif gone == "renamed":
        place.out.rename(place.directory / "other")
        found = f"{place.out} to stay while the run writes, found no {metrics} (No such file or directory)"
    else:
        shutil.copy(metrics, place.out / "copy")
        os.replace(place.out / "copy", metrics)
        found = f"{metrics} to stay while the run writes, found another file there"
    assert run.code() == 1
    last = run.said.splitlines()[-1]
    assert last == f"rlhf-fast: output_dir: expected {found} (--debug shows where)"
    assert "Traceback" not in run.said and place.out.exists() == (gone == "replaced")
    if gone == "replaced":
        assert checkpoint.latest(place.out) is not None


@pytest.mark.parametrize("room", [0, 100, 3_000, 60_000, 200_000])
def test_a_full_disk(room, place, whole):
    """No file may grow beyond `room` bytes. With room again the run starts or goes on, and is the undisturbed run."""

    def limited() -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
        return command(*place.flags("--save-steps", "1"))

    reader, writer = os.pipe()
    assert Forked(limited, place.directory / "said", writer).code() == 1
    os.close(writer)
    with os.fdopen(reader) as said:
        lines = said.read().splitlines()
    assert "Traceback" not in "".join(lines)
    last = r"rlhf-fast: /\S* could not be written: (File too large|Input/output error); the files .*"
    assert re.fullmatch(last, lines[-1]), lines
    again = checkpoint.latest(place.out) is not None
    assert place.run(*["--resume"] * again).code() == 0
    assert same(place.out, whole)
