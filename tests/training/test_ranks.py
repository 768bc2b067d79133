"""Several processes train as one: the same metrics, weights and tokens; one process writes and speaks."""

import json
import signal
import time

import pytest
import torch

from rlhf_fast.ranks import Ranks
from rlhf_fast.training import checkpoint
from rlhf_fast.training.lock import held
from rlhf_fast.training.metrics import read_metrics
from tests.support.ranks import COMMON, JOBS, jobs_in, launch, models, once, results_of, start, train, train_in
from tests.support.stages import LENGTHS, REWARD, distance, interrupted, numbers, weights


@pytest.fixture(scope="module")
def trained(files, tiny_model, tmp_path_factory):
    """Size -> the directory of runs with so many processes; and what the processes said."""

    def make(directory):
        named = models(directory, files, tiny_model)
        train(jobs_in(directory / "1", named, tiny_model))
        return {size: train_in(size, jobs_in(directory / str(size), named, tiny_model), directory) for size in (2, 3)}

    return once(tmp_path_factory, "ranks", make)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", JOBS)
def test_several_processes_give_the_numbers_of_one(name, size, trained):
    directory, said = trained
    assert [result.returncode for result in said[size]] == [0] * size, said[size][0].stderr
    one, several = directory / "1" / name, directory / str(size) / name
    rows, others = numbers(one), numbers(several)
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others, strict=True):
        assert row.keys() == other.keys()
        for key in row.keys() - {"val/logprob_drift", "val/logprob_drift_mean"}:  # differences of rounding
            assert other[key] == pytest.approx(row[key], rel=1e-4, abs=1e-5), (row["step"], key)
    assert distance(weights(one), weights(several)) < 1e-5
    for file in ("samples.json", "samples_before.json"):
        if (one / file).exists():
            mine, theirs = (json.loads((path / file).read_text()) for path in (one, several))
            assert [row["completion"] for row in mine] == [row["completion"] for row in theirs]


def test_the_first_process_alone_speaks(trained):
    _, said = trained
    first, *others = said[3]
    assert "SFT  1/" in first.stderr
    assert [other.stdout + other.stderr for other in others] == ["", ""]


def test_shares_are_consecutive_and_differ_by_one_row_at_most():
    rows = list(range(11))
    shares = [Ranks(rank, 3).share(rows) for rank in range(3)]
    assert [row for share in shares for row in share] == rows and [len(share) for share in shares] == [3, 4, 4]
    assert Ranks(2, 3).earlier(rows) == rows[:7] and Ranks().share(rows) is rows
    assert Ranks(1, 2).share([5]) == [5] and Ranks(0, 2).share([5]) == []


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
