"""Stages with their models in shards: the metrics, weights and tokens of one process; checkpoints; refusals."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_fast import cli
from rlhf_fast.config import SFTConfig
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.sharding import shard
from rlhf_fast.lm.state_files import parts_of
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
        return jobs_in(where, named, jobs, **options)

    return one, *once(tmp_path_factory, "shards", lambda directory: _train_all(made, directory, one))


def _train_all(made, directory, one):
    said = {}
    in_two = made(ALL, directory / "2", shard="full")
    lora = {"ppo_models": ALL["ppo_models"]}
    in_two += made(lora, directory / "whole_base", shard="full", shard_base=False)
    said[2] = train_in(2, in_two, directory, FILE_BYTES="20000")

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
    interrupted(directory / "2/sft_saved", directory / "cut_hybrid/sft_saved")
    four = made({"sft_saved": RESUMED["sft_saved"]}, directory / "cut_hybrid", resume=True, shard="hybrid")
    four += made({"loaded.json": ("load", {"model": "large", "warm": "tied"})}, directory)
    shards = {"4": "full", "whole": "none", "hybrid": "hybrid"}
    for where, names in FOUR.items():
        four += made({name: ALL[name] for name in names}, directory / where, shard=shards[where])
    # glibc gives freed memory of this size back at once, so that the bytes of a process are those that it uses
    said[4] = train_in(4, four, directory, LOCAL_WORLD_SIZE="2", MALLOC_MMAP_THRESHOLD_="65536")
    return said


@pytest.mark.parametrize("size", [1, 2, 3, 4, "again"])
def test_the_processes_end_well(size, trained):
    said = trained[2]
    assert [result.returncode for result in said[size]] == [0] * len(said[size]), said[size][0].stderr
    assert all(result.stdout + result.stderr == "" for result in said[size][1:])
    assert "FSDP" not in said[size][0].stderr  # no warning of FSDP2


RUNS = [(2, name) for name in ALL] + [(size, name) for size in (1, 3) for name in SMALL]
RUNS += [(where, name) for where, names in FOUR.items() for name in names] + [("whole_base", "ppo_models")]


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


def test_the_base_of_adapters_is_whole_where_asked(trained):
    """The policy's base, on which the reference stands, and the value model's; the reward model is in shards."""
    places = (trained[0], trained[1] / "2", trained[1] / "whole_base")
    bytes_of = [json.loads((place / "ppo_models/run.json").read_text())["static_bytes"] for place in places]
    plain, parts, kept = ({role: of[role]["weights"] for role in of} for of in bytes_of)
    for role in ("policy", "value"):
        assert kept[role] == pytest.approx(plain[role], rel=0.01) and parts[role] < 0.7 * plain[role]
    assert kept["reference"] == plain["reference"] == 0
    reward = next(role for role in plain if role.startswith("reward"))
    assert kept[reward] == parts[reward] < 0.6 * plain[reward]


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


def test_a_run_goes_on_with_other_shards(trained):
    one, several, _ = trained
    for before, after in ((one, "cut_plain"), (several / "2", "cut_hybrid")):
        assert distance(weights(before / "sft_saved"), weights(several / after / "sft_saved")) < 1e-5


@pytest.mark.parametrize("place", ["ppo", "ppo/value", "sft_saved/checkpoint-4"])
def test_a_model_in_shards_is_saved_in_files_of_a_layer_each(place, trained):
    place = trained[1] / "2" / place
    index = json.loads((place / "model.safetensors.index.json").read_text())
    tensors = {file.name: load_file(file) for file in sorted(place.glob("*.safetensors"))}
    assert [*tensors] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == {name: file for file, held in tensors.items() for name in held}
    total = sum(tensor.nbytes for held in tensors.values() for tensor in held.values())
    assert index["metadata"]["total_size"] == total


def test_a_machine_holds_the_weights_once_while_they_are_loaded(trained):
    """Four processes; the weights are the right ones, also where pickle does not take the model."""
    found = json.loads((trained[1] / "loaded.json").read_text())
    assert 84e6 < found["model"] < 88e6
    assert found["model"] < found["peak"] < 1.5 * found["model"]
    assert found["after"] < 1.2 * found["model"]
    truth = {name: p.double().sum().item() for name, p in load_policy(trained[0] / "large").named_parameters()}
    assert found["sums"] == pytest.approx(truth, abs=1e-9)
    first, again = found["again"]
    assert first == again


def test_damaged_states_of_an_optimizer_are_one_line(trained, tmp_path):
    whole = trained[1] / "2/sft_saved/checkpoint-4"
    assert not [file for file in (whole / "state").iterdir() if file.suffix != ".safetensors"]  # no pickled code
    cut = tmp_path / "checkpoint-4"
    for damage, said in (
        (lambda file: file.unlink(), r"found \d+ of the \d+ numbers of policy/optimizer/state/\d+/exp_avg"),
        (lambda file: file.write_bytes(b"no safetensors"), "Error while deserializing header"),
        (lambda file: shutil.rmtree(file.parent), "No such file or directory"),
    ):
        shutil.rmtree(cut, ignore_errors=True)
        shutil.copytree(whole, cut)
        saved = checkpoint.load_state(cut)["policy"]["optimizer"]["state"]
        wanted = [(moment, torch.empty(moment.shape)) for of in saved.values() for moment in (of["exp_avg"],)]
        usual = parts_of(wanted)
        assert all(part.isfinite().all() for part in usual) and any(part.any() for part in usual)
        damage(sorted((cut / "state").iterdir())[0])
        with pytest.raises(ValueError, match=rf"^{cut}/state: expected the states of the optimizer.*damaged: .*{said}"):
            parts_of(wanted)
        with pytest.raises(ValueError, match="^resume: expected a checkpoint that is not damaged.*state/shard-00001"):
            checkpoint.newest_whole(tmp_path)


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


@pytest.mark.parametrize(
    ("config", "wrong", "message"),
    [
        (
            SFTConfig,
            {"optimizer": "adamw_8bit"},
            "optimizer: expected adamw with shard=full, got adamw_8bit, whose blocks of states cannot be cut into "
            "shards; adamw_8bit goes with lora_rank, whose adapters are not in shards",
        ),
        (
            SFTConfig,
            {"shard_base": False},
            "shard_base: expected False beside shard and lora_rank alone, got it with shard=full and lora_rank=0",
        ),
        (
            SFTConfig,
            {"shard": "none", "shard_base": False, "lora_rank": 4},
            "shard_base: expected False beside shard and lora_rank alone, got it with shard=none and lora_rank=4",
        ),
    ],
)
def test_what_does_not_go_with_shards_is_refused(config, wrong, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        config(**CONFIG | wrong)


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


def test_a_dry_run_without_a_launcher_plans_no_shards(capsys):
    given = ["--model=m", "--output-dir=o", "--train-data=t.jsonl", "--shard=full", "--dry-run"]
    assert cli.main(["sft", *given]) == 1
    said = capsys.readouterr().err
    assert "shard: expected none with --dry-run in one process, got full; start it with torchrun, or use" in said
