"""Several processes train as one: the same metrics, weights and tokens; one process writes and speaks."""

import signal
import time

import pytest
import torch
import torch.distributed as dist

from rlhf_fast import failing, ranks
from rlhf_fast.ranks import Ranks
from rlhf_fast.training import checkpoint, reward_functions
from rlhf_fast.training.lock import held
from rlhf_fast.training.metrics import read_metrics
from tests.support.ranks import (
    COMMON,
    JOBS,
    OWN,
    check_bits,
    check_same,
    jobs_in,
    launch,
    once,
    plain,
    results_of,
    start,
    train_in,
)
from tests.support.stages import LENGTHS, REWARD, constant, distance, interrupted, numbers, weights

TWO = JOBS | {name: OWN[name] for name in ("sft_tied", "remax_bf16")}
THREE = {name: job for name, job in JOBS.items() if name not in ("sft_8bit", "ppo_shared_in_backward")}
TWICE = {name: JOBS[name] for name in ("ppo_base", "dpo")}


@pytest.fixture(scope="module")
def trained(files, tiny_model, tokenizer, tmp_path_factory):
    """The directory of runs in one process; that of runs by number of processes; what the processes said."""
    one, named = plain(tmp_path_factory, files, tiny_model, tokenizer)

    def make(directory):
        jobs = {size: jobs_in(directory / str(size), named, jobs) for size, jobs in ((2, TWO), (3, THREE))}
        jobs[2] += jobs_in(directory / "again", named, TWICE)
        return {size: train_in(size, some, directory) for size, some in jobs.items()}

    return one, *once(tmp_path_factory, "ranks", make)


@pytest.mark.parametrize(("size", "name"), [(2, name) for name in TWO] + [(3, name) for name in THREE])
def test_several_processes_give_the_numbers_of_one(size, name, trained):
    one, directory, said = trained
    assert [result.returncode for result in said[size]] == [0] * size, said[size][0].stderr
    check_same(name, one / name, directory / str(size) / name)


@pytest.mark.parametrize("name", TWICE)
def test_as_many_processes_give_the_same_bits(name, trained):
    check_bits(trained[1] / "2" / name, trained[1] / "again" / name)


def test_the_first_process_alone_speaks(trained):
    first, *others = trained[2][3]
    assert "SFT  1/" in first.stderr
    assert [other.stdout + other.stderr for other in others] == ["", ""]


def test_shares_are_consecutive_and_differ_by_one_row_at_most():
    rows = list(range(11))
    shares = [Ranks(rank, 3).share(rows) for rank in range(3)]
    assert [row for share in shares for row in share] == rows and [len(share) for share in shares] == [3, 4, 4]
    assert Ranks(2, 3).earlier(rows) == rows[:7] and Ranks().share(rows) is rows
    assert Ranks(1, 2).share([5]) == [5] and Ranks(0, 2).share([5]) == []


def test_processes_wait_two_hours_for_a_slow_reward_function(monkeypatch):
    waits = []
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(
        ranks, "rendezvous", lambda url, timeout: iter([waits.append(timeout) or (dist.HashStore(), 0, 1)])
    )
    monkeypatch.setattr(dist, "init_process_group", lambda *_, timeout, **__: waits.append(timeout))
    monkeypatch.setattr(ranks.atexit, "register", lambda _: None)
    monkeypatch.setattr(failing, "_store", None)
    ranks.connect()
    assert [wait.total_seconds() for wait in waits] == [7200, 7200]
    monkeypatch.setattr(reward_functions, "current", lambda: Ranks(0, 2))
    assert reward_functions.FunctionReward(constant, 7199).timeout == 7199
    with pytest.raises(ValueError, match="^reward_timeout: expected less than the 7200 seconds that .*, got 7200$"):
        reward_functions.FunctionReward(constant, 7200)


def test_one_process_needs_no_group():
    x = torch.arange(3.0)
    assert Ranks().sum(x) is x and Ranks().gather(2) == [2] and Ranks().join([[1], [2, 3]]) == [1, 2, 3]
    Ranks().wait()


def test_a_failure_is_said_once_with_its_process(files, tiny_model, tmp_path):
    (tmp_path / "bad.py").write_text(
        "import os\n\ndef bad(completions):\n    if os.environ['RANK'] == '1':\n        raise RuntimeError('no luck')\n"
        "    return [0.0] * len(completions)\n"
    )
    options = [f"--model={tiny_model}", f"--train-data={files['prompts']}", f"--output-dir={tmp_path / 'out'}"]
    options += [f"--reward={tmp_path / 'bad.py'}:bad", "--steps=2", "--batch-size=4", "--max-response-length=8"]
    first, second = launch(2, "-m", "rlhf_fast", "reinforce", *options)
    assert first.returncode == second.returncode == 1
    assert "process 1 of 2" in second.stderr and "no luck" in second.stderr
    assert "no luck" not in first.stderr and "Traceback" not in first.stderr


@pytest.mark.parametrize("shard", ["none", "full"])
def test_a_failed_process_stays_until_the_others_know_who_failed(shard, files, tiny_model, tmp_path):
    """Process 0 keeps the store. Process 1 is slow here between two questions to the store."""
    (tmp_path / "slow.py").write_text(
        "import os, time\n\nfrom rlhf_fast import failing\nfrom rlhf_fast.training.learner import Learner\n\n"
        "def clip(*arguments, **options):\n    raise ValueError('no luck')\n\n"
        "def say(what, original=failing._say):\n    original(what)\n    time.sleep(1.0)\n\n"
        "if os.environ['RANK'] == '0':\n    Learner.clip = clip\nelse:\n    failing._say = say\n\n"
        "def reward(completions):\n    return [float(len(text)) for text in completions]\n"
    )
    options = [f"--model={tiny_model}", f"--train-data={files['prompts']}", f"--output-dir={tmp_path / 'out'}"]
    options += [f"--reward={tmp_path / 'slow.py'}:reward", "--steps=2", "--batch-size=4", "--max-response-length=8"]
    first, second = launch(2, "-m", "rlhf_fast", "reinforce", f"--shard={shard}", *options)
    assert first.returncode == second.returncode == 1
    assert "rlhf-fast: process 0 of 2: " in first.stderr and "no luck" in first.stderr
    assert "rlhf-fast: " not in second.stderr and "sendBytes" not in second.stderr, second.stderr


def test_a_signal_ends_all_processes_after_the_same_step(files, tiny_model, tmp_path):
    options = [f"--model={tiny_model}", f"--train-data={files['sft']}", f"--output-dir={tmp_path}", "--epochs=500"]
    running = start(2, "-m", "rlhf_fast", "sft", *options)
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)  # one process alone, as where a scheduler is slow
    results = results_of(running)
    assert [result.returncode for result in results] == [143, 143]
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert checkpoint.latest(tmp_path) == tmp_path / f"checkpoint-{last}"
    said = [line for result in results for line in result.stderr.splitlines() if "ended by SIGTERM" in line]
    assert len(said) == 1 and f"checkpoint-{last} is saved" in said[0]


@pytest.mark.parametrize(("shard", "victim"), [("none", 0), ("full", 1)])
def test_the_death_of_a_process_ends_the_others(shard, victim, files, tiny_model, tmp_path):
    options = [f"--model={tiny_model}", f"--train-data={files['sft']}", f"--output-dir={tmp_path}", "--epochs=500"]
    running = start(2, "-m", "rlhf_fast", "sft", f"--shard={shard}", "--save-steps=2", *options)
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 5:
        time.sleep(0.05)
    running[victim].kill()
    began = time.monotonic()
    other = results_of(running)[1 - victim]
    assert other.returncode == 1 and time.monotonic() - began < 30
    assert f"rlhf-fast: process {1 - victim} of 2: process {victim} of 2 has ended" in other.stderr
    assert "Traceback" not in other.stderr
    assert checkpoint.latest(tmp_path) is not None


def test_a_second_run_in_the_directory_is_refused_in_every_process(files, tiny_model, tmp_path):
    options = [f"--model={tiny_model}", f"--train-data={files['sft']}", f"--output-dir={tmp_path}"]
    with held(tmp_path):
        results = launch(2, "-m", "rlhf_fast", "sft", *options)
    assert [result.returncode for result in results] == [1, 1]
    said = [line for result in results for line in result.stderr.splitlines() if line.startswith("rlhf-fast: ")]
    assert len(said) == 1 and "expected no other run in" in said[0]


def test_commands_for_one_process_refuse_several():
    first, second = launch(2, "-m", "rlhf_fast", "demo")
    assert first.returncode == second.returncode == 2 and second.stderr == ""
    assert first.stderr == "rlhf-fast: process 0 of 2: demo: expected one process, got 2; start it without torchrun\n"


@pytest.mark.parametrize(("stage", "size"), [("sft", 1), ("ppo", 3), ("remax", 2)])
def test_a_run_goes_on_with_another_number_of_processes(stage, size, files, tiny_model, tmp_path):
    own = (
        {"train_data": files["sft"], "max_length": 48} if stage == "sft" else {"steps": 6, "reward": REWARD, **LENGTHS}
    )
    options = {**COMMON, "train_data": files["prompts"], "model": tiny_model, "save_steps": 4, **own}
    train_in(2, [(stage, {**options, "output_dir": str(tmp_path / "whole")})], tmp_path)
    cut = tmp_path / "cut"
    whole = tmp_path / "whole"
    assert [path.name for path in whole.glob("checkpoint-*")] == ["checkpoint-4"]
    interrupted(whole, cut)
    results = train_in(size, [(stage, {**options, "output_dir": str(cut), "resume": True})], tmp_path)
    assert [result.returncode for result in results] == [0] * size, results[0].stderr
    largest = distance(weights(whole), weights(cut))
    assert largest == 0 if size == 2 else largest < 1e-5
    assert [row["step"] for row in numbers(cut)] == [row["step"] for row in numbers(whole)]
