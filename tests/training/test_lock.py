"""One writer for a directory: who is refused, and that no lock outlives its process."""

import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from rlhf_fast import cli
from rlhf_fast.data.files import WRITING, beside
from rlhf_fast.methods import STAGES, load
from rlhf_fast.training import lock
from rlhf_fast.training.lock import held, held_file


def in_a_thread(function):
    """The error that the function raises in another thread, or None."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0]


def enter(directory):
    with held(directory):
        return None


def test_a_second_writer_is_refused_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf-fast", "sft", "--config", "a b.yaml"])
    out = tmp_path / "a" / "out"
    with held(out), held(os.path.relpath(out)):  # the same thread may enter again
        assert os.listdir(out) == [lock.NAME]
        error = in_a_thread(lambda: enter(out))
        command = f"process {os.getpid()} writes there: rlhf-fast sft --config 'a b.yaml'"
        assert str(error) == f"output_dir: expected no other run in {out}, but {command}"
        assert os.listdir(out) == [lock.NAME] and not lock.lost(out)
    assert os.listdir(tmp_path) == []  # directories in which nothing was written are gone
    assert in_a_thread(lambda: enter(out)) is None


def test_every_command_that_trains_locks_its_directory(tmp_path):
    trained = {stage.train: "output_dir" for stage in STAGES.values()}
    others = {c.run: "out" if n.startswith("study") else "output_dir" for n, c in cli.COMMANDS.items()}
    alone = {run: field for run, field in others.items() if run.startswith(("lab.compare", "lab.demo", "report.pipel"))}
    alone |= {run: field for run, field in others.items() if field == "out"} | trained
    alone |= {"stages.init:init": "output_dir"}
    assert len(alone) == len(STAGES) + 4 + 7
    with held(tmp_path):
        for run, field in alone.items():
            error = in_a_thread(lambda run=run, field=field: load(run)(SimpleNamespace(**{field: tmp_path})))
            assert str(error).startswith(f"{field}: expected no other run in {tmp_path}, but process"), run


def enter_file(file):
    with held_file(file, "output"):
        return None


def test_a_file_has_one_writer_and_its_directory_many(tmp_path):
    file = tmp_path / "new" / "pairs.jsonl.gz"
    with held_file(file, "output"), held_file(file, "output"):
        error = in_a_thread(lambda: enter_file(file))
        assert str(error).startswith(f"output: expected no other run that writes {file}, but process {os.getpid()} ")
        assert in_a_thread(lambda: enter_file(file.with_name("other.jsonl"))) is None
        assert os.listdir(file.parent) == [".rlhf_fast-lock-pairs.jsonl.gz"]
    assert os.listdir(tmp_path) == []
    with held(file.parent), held_file(file, "output"):
        assert os.listdir(file.parent) == [lock.NAME]  # whoever has the directory has its files


@pytest.mark.parametrize("name", ["pairs.jsonl", "n" * 250])
def test_what_a_killed_writer_of_a_file_left_is_cleaned_up(name, tmp_path):
    file, other = tmp_path / name, tmp_path / "other.jsonl"
    left = [beside(path, f"{WRITING}{pid}-") for path in (file, other) for pid in (7, 4194304)]
    for path in (*left, file, other):
        path.write_text("x")
    enter_file(file)
    assert sorted(tmp_path.iterdir()) == sorted([file, other, *left[2:]])


@pytest.mark.parametrize("forks", [False, True])
def test_a_lock_ends_with_its_process(forks, tmp_path):
    """A killed holder leaves a file that is no obstacle. A process that the holder has forked has no lock."""
    reading, writing = os.pipe()
    holder = os.fork()
    if holder == 0:
        with held(tmp_path):
            child = os.fork() if forks else -1
            if child != 0:
                os.write(writing, str(child).encode())
            time.sleep(60)
        os._exit(1)
    child = int(os.read(reading, 20))
    with pytest.raises(ValueError, match=f"but process {holder} writes there"):
        enter(tmp_path)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    assert os.listdir(tmp_path) == [lock.NAME]
    enter(tmp_path)
    assert os.listdir(tmp_path) == []
    if forks:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (os.fsdecode(b"caf\xe9"), "expected a path in UTF-8, got 'caf.*e9'"),
        ("n" * 256, "expected a shorter path or name, got 256 bytes"),
        ("/".join(["n" * 99] * 40), "expected a shorter path or name, got 3999 bytes"),
    ],
)
def test_names_that_cannot_be_written_are_found_at_once(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^output_dir: {message}$"):
        enter(name)
    assert os.listdir(tmp_path) == []


def test_a_directory_that_was_moved_or_replaced_is_lost(tmp_path):
    out = tmp_path / "out"
    with held(out):
        out.rename(tmp_path / "moved")
        assert lock.lost(out)
        assert in_a_thread(lambda: enter(out)) is None  # another run may begin there
        out.mkdir()
        assert lock.lost(out)
    assert not lock.lost(out)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    enter(tmp_path)
    said = f"output_dir: {tmp_path} cannot be locked (Operation not supported); start no second run there\n"
    assert capsys.readouterr().err == said
