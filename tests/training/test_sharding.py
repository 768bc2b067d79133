"""Stages with their models in shards: the metrics, weights and tokens of one process; checkpoints; refusals."""

import json
import signal
import time
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.config import SFTConfig
from rlhf_fast.lm.sharding import shard
from rlhf_fast.stages import sft
from rlhf_fast.training import checkpoint
from rlhf_fast.training.metrics import read_metrics
from tests.support.models import random_policy
from tests.support.ranks import (
    ALL,
    RESUMED,
    SHORT,
    Job,
    check_bits,
    check_same,
    jobs_in,
    once,
    plain,
    results_of,
    start,
    train,
    train_in,
)
from tests.support.stages import distance, interrupted, weights

SMALL = {name: ALL[name] for name in ("sft_one_row", "ppo", "remax_scored")}
FOUR = {"4": ("ppo_base", "grpo"), "whole": ("ppo", "kto"), "hybrid": ("sft",)}  # folder -> jobs in four processes
TWICE = {name: ALL[name] for name in ("ppo_base", "dpo")}


@pytest.fixture(scope="module")
def trained(files, tiny_model, tokenizer, tmp_path_factory):
    """The directory of runs in one process; that of a folder for each number of processes; what the processes said."""
    one, named = plain(tmp_path_factory, files, tiny_model, tokenizer)

    def made(jobs: dict[str, Job], where: Path, **options) -> list[Job]:
        return jobs_in(where, named, tiny_model, jobs, **options)

    return one, *once(tmp_path_factory, "shards", lambda directory: _train_all(made, directory, one))


def _train_all(made, directory, one):
    said = {}
    said[2] = train_in(2, made(ALL, directory / "2", shard="full"), directory)

    def cut_off(whole: Path, name: str, **options) -> list[Job]:
        for job in RESUMED:
            interrupted(whole / job, directory / name / job)
        return made(RESUMED, directory / name, resume=True, **options)

    said[1] = train_in(1, made(SMALL, directory / "1", shard="full"), directory)
    small = made(SMALL, directory / "3", shard="full") + cut_off(directory / "2", "cut_3", shard="full")
    said[3] = train_in(3, small, directory)
    again = cut_off(directory / "2", "cut_2", shard="full") + cut_off(one, "cut_plain", shard="full")
    again += made(TWICE, directory / "again", shard="full")
    said["again"] = train_in(2, again, directory)
    train(cut_off(directory / "2", "cut_1"))
    shards = {"4": "full", "whole": "none", "hybrid": "hybrid"}
    four = {where: made({name: ALL[name] for name in names}, directory / where, shard=shards[where])
            for where, names in FOUR.items()}  # fmt: skip
    said[4] = train_in(4, [job for jobs in four.values() for job in jobs], directory, LOCAL_WORLD_SIZE="2")
    return said


@pytest.mark.parametrize("size", [1, 2, 3, 4, "again"])
def test_the_processes_end_well(size, trained):
    said = trained[2]
    assert [result.returncode for result in said[size]] == [0] * len(said[size]), said[size][0].stderr
    assert all(result.stdout + result.stderr == "" for result in said[size][1:])
    assert "FSDP" not in said[size][0].stderr  # no warning of FSDP2


RUNS = [(2, name) for name in ALL] + [(size, name) for size in (1, 3) for name in SMALL]
RUNS += [(where, name) for where, names in FOUR.items() for name in names]


@pytest.mark.parametrize(("where", "name"), RUNS)
def test_shards_give_the_numbers_of_one_process(where, name, trained):
    check_same(name, trained[0] / name, trained[1] / str(where) / name)


@pytest.mark.parametrize("name", TWICE)
def test_as_many_processes_give_the_same_bits(name, trained):
    check_bits(trained[1] / "2" / name, trained[1] / "again" / name)


def test_run_json_has_the_bytes_of_one_process(trained):
    plain, half = (json.loads((d / "remax_scored/run.json").read_text()) for d in (trained[0], trained[1] / "2"))
    for role, parts in plain["static_bytes"].items():
        for part, size in parts.items():
            assert 0.5 * size <= half["static_bytes"][role][part] <= 0.56 * size, (
                role,
                part,
            )  # buffers are not sharded
    assert [one["static_bytes"].keys() for one in half["processes"]] == [plain["static_bytes"].keys()] * 2
    assert half["parameters"] == plain["parameters"] and half["trained_parameters"] == plain["trained_parameters"]


def test_models_on_one_base_have_its_parts_once(trained):
    plain, half = (json.loads((d / "ppo_base/run.json").read_text()) for d in (trained[0], trained[1] / "2"))
    roles, parts = plain["static_bytes"], half["static_bytes"]
    assert parts["policy"]["weights"] < 0.6 * roles["policy"]["weights"]
    assert parts["reference"]["weights"] == 0 and parts["value"] == roles["value"]
    assert parts["reward"]["weights"] < 0.6 * roles["reward"]["weights"]  # a frozen adapter and its head


@pytest.mark.parametrize("name", ["sft_tied", "ppo"])
def test_the_saved_model_is_as_from_one_process(name, trained):
    one, several = trained[0] / name, trained[1] / "2" / name
    assert json.loads((one / "config.json").read_text()) == json.loads((several / "config.json").read_text())
    assert [*weights(one)] == [*weights(several)]


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_run_goes_on_with_other_processes_and_shards(size, name, trained):
    """A run in two processes was cut off; it goes on in two, with the same bits, in three, and without shards."""
    largest = distance(weights(trained[1] / "2" / name), weights(trained[1] / f"cut_{size}" / name))
    assert largest == 0 if size == 2 else largest < (2e-3 if "bf16" in name else 1e-5)


def test_a_run_without_shards_goes_on_with_them(trained):
    assert distance(weights(trained[0] / "sft_saved"), weights(trained[1] / "cut_plain/sft_saved")) < 1e-5


def test_a_signal_ends_all_processes_after_the_same_step(files, tiny_model, tmp_path):
    options = [f"--model={tiny_model}", f"--train-data={files['sft']}", f"--output-dir={tmp_path}", "--epochs=500"]
    running = start(2, "-m", "rlhf_fast", "sft", "--shard=full", *options)
    while len(read_metrics(tmp_path / "metrics.jsonl")) < 3:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    results = results_of(running)
    assert [result.returncode for result in results] == [143, 143], results[0].stderr
    last = read_metrics(tmp_path / "metrics.jsonl")[-1]["step"]
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / f"checkpoint-{last}", [])


CONFIG = {"model": "m", "output_dir": "o", "train_data": "t.jsonl", "shard": "full"}


def test_states_in_8_bits_go_with_shards_for_adapters_alone():
    refused = (
        "^optimizer: expected adamw with shard=full, got adamw_8bit, whose blocks of states cannot be cut into shards"
    )
    with pytest.raises(ValueError, match=refused):
        SFTConfig(**CONFIG, optimizer="adamw_8bit")
    assert SFTConfig(**CONFIG, optimizer="adamw_8bit", lora_rank=4).shard == "full"


def test_one_process_without_a_launcher_is_refused(files, tiny_model, tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = SFTConfig(model=tiny_model, output_dir=str(tmp_path), train_data=files["sft"], shard="full", **SHORT)
    with pytest.raises(ValueError, match="^shard: expected none in a process that no launcher such as torchrun has"):
        sft.train(config)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_none_leaves_a_model_as_it_is():
    model = random_policy("llama")
    kinds = {type(parameter) for parameter in model.parameters()}
    shard(model, "none")
    assert kinds == {type(parameter) for parameter in model.parameters()} == {torch.nn.Parameter}


def test_a_dry_run_plans_no_shards(capsys):
    given = ["--model=m", "--output-dir=o", "--train-data=t.jsonl", "--shard=full", "--dry-run"]
    assert cli.main(["sft", *given]) == 1
    assert "shard: expected none with --dry-run, got full; `rlhf-fast plan --gpus N" in capsys.readouterr().err
