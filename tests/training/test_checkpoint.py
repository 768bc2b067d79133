"""Round trips, crashes at the worst moments, and exact continuation of the random generators."""

import itertools
import json
import os
import random
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rlhf_fast.data.files import sweep
from rlhf_fast.lm import manifest
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.training import checkpoint


def config(**options) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=13, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, **options
    )


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<eos>": 0, "good": 1, "film": 2}, unk_token="<eos>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>")


def hidden(directory) -> list[str]:
    return [name for name in os.listdir(directory) if name.startswith(".")]


def test_round_trip(tmp_path, capfd):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config())
    value = LlamaForSequenceClassification(config(num_labels=1, pad_token_id=0))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.1)
    policy(torch.tensor([[1, 2, 3]])).logits.sum().backward()
    optimizer.step()
    path = checkpoint.save(
        tmp_path / "out" / "checkpoint-3",
        models={"": policy, "value": value},
        tokenizer=tokenizer(),
        state={"step": 3, "optimizer": optimizer.state_dict(), "name": "ppo"},
        extra_files={"memory.json": {"policy": {"weights": 4}}},
    )
    assert path == tmp_path / "out" / "checkpoint-3" == checkpoint.latest(tmp_path / "out")
    assert (path / "model.safetensors").is_file() and (path / "value" / "model.safetensors").is_file()
    assert not hidden(tmp_path / "out")
    assert capfd.readouterr() == ("", "")  # no progress bars of others across ours

    loaded = AutoModelForCausalLM.from_pretrained(path).state_dict()
    assert loaded.keys() == policy.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in policy.state_dict().items())
    loaded_value = AutoModelForSequenceClassification.from_pretrained(path / "value")
    assert torch.equal(loaded_value.score.weight, value.score.weight)
    assert AutoTokenizer.from_pretrained(path)("good film").input_ids == [1, 2]
    assert json.loads((path / "memory.json").read_text()) == {"policy": {"weights": 4}}

    state = checkpoint.load_state(path)
    assert (state["step"], state["name"]) == (3, "ppo")
    restored = torch.optim.AdamW(policy.parameters(), lr=0.5)
    restored.load_state_dict(state["optimizer"])
    assert restored.param_groups[0]["lr"] == 0.1
    for parameter in policy.parameters():
        assert torch.equal(restored.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg"])


class BrokenModel(torch.nn.Module):
    def save_pretrained(self, path, **_):
        os.makedirs(path)
        with open(os.path.join(path, "config.json"), "w") as file:
            file.write("{")
        raise RuntimeError("disk full")


def test_crash_while_writing_leaves_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint-5"
    checkpoint.save(path, models={}, state={"step": 5})
    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.save(path, models={"policy": BrokenModel()}, state={"step": -1})
    with pytest.raises(RuntimeError, match="disk full"):
        checkpoint.save(tmp_path / "checkpoint-6", models={"policy": BrokenModel()})
    assert checkpoint.latest(tmp_path) == path
    assert checkpoint.load_state(path) == {"step": 5}
    checkpoint.save(path, models={}, state={"step": 7})  # the left-overs are no obstacle and disappear
    assert checkpoint.load_state(path) == {"step": 7}
    assert hidden(tmp_path) == [".rlhf_fast-writing-checkpoint-6"]
    sweep(tmp_path)
    assert os.listdir(tmp_path) == ["checkpoint-5"]


def test_crash_between_the_renames_is_repaired(tmp_path, monkeypatch):
    path = tmp_path / "final"
    checkpoint.save(path, models={}, state={"step": 1})
    replace = os.replace

    def dies_at_last(source, target):
        if target == path:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_at_last)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, models={}, state={"step": 2})
    monkeypatch.undo()
    assert not path.exists()
    with pytest.raises(RuntimeError):
        checkpoint.save(path, models={"policy": BrokenModel()})
    assert checkpoint.load_state(path) == {"step": 1}


def test_output_directory_keeps_its_other_files(tmp_path, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    checkpoint.save(tmp_path / "checkpoint-1", models={}, state={"step": 1})
    model = LlamaForCausalLM(config())
    checkpoint.save(tmp_path, models={"": model, "value": model}, extra_files={"run.json": {"seconds": 1}})
    checkpoint.save(tmp_path, models={"": model}, state={"step": 2}, extra_files={"run.json": {"seconds": 2}})
    assert sorted(os.listdir(tmp_path)) == [
        "checkpoint-1",
        "checkpoint.json",
        "config.json",
        "generation_config.json",
        "metrics.jsonl",
        "model.safetensors",
        "run.json",
        "state.pt",
    ]
    assert (tmp_path / "metrics.jsonl").read_text() == "{}\n"
    assert checkpoint.load_state(tmp_path) == {"step": 2} and checkpoint.load_state(tmp_path / "checkpoint-1")
    assert json.loads((tmp_path / "run.json").read_text()) == {"seconds": 2}
    assert json.loads((tmp_path / "checkpoint.json").read_text())["complete"] is True

    replace = os.replace

    def dies_at_state(source, target):
        if target.name == "state.pt":
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", dies_at_state)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, models={}, state={"step": 3})
    monkeypatch.undo()
    assert json.loads((tmp_path / "checkpoint.json").read_text())["complete"] is False
    checkpoint.save(tmp_path, models={}, state={"step": 4})
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint.json", "metrics.jsonl", "state.pt"]
    assert checkpoint.load_state(tmp_path) == {"step": 4}


def test_run_json_is_renamed_last_and_nothing_reads_what_a_crash_left(tmp_path, monkeypatch, tiny_model):
    """A crash at every rename and every deletion of the final save over an earlier run's model."""
    out = tmp_path / "out"
    model, seconds = AutoModelForCausalLM.from_pretrained(tiny_model), iter(range(99))

    def save():
        run = {"run.json": {"seconds": next(seconds)}, "samples.json": {}}
        models = {"": model, "value": LlamaForSequenceClassification(config(num_labels=1))}
        checkpoint.save(out, models=models, tokenizer=AutoTokenizer.from_pretrained(tiny_model), extra_files=run)

    out.mkdir()
    (out / "metrics.jsonl").write_text("")
    save()
    assert checkpoint.finished(out) == {"seconds": 0}
    refused, renamed = 0, []
    for at in range(100):
        done = itertools.count()

        def dies(real, *arguments, done=done, at=at, **options):
            if next(done) == at:
                raise KeyboardInterrupt
            renamed.append(Path(arguments[-1]).name)
            return real(*arguments, **options)

        for module, name in ((os, "replace"), (shutil, "rmtree"), (os, "unlink")):
            monkeypatch.setattr(module, name, partial(dies, getattr(module, name)))
        try:
            save()
            break
        except KeyboardInterrupt:
            monkeypatch.undo()
        if manifest.read(out).complete:
            load_policy(out)
        else:
            assert checkpoint.finished(out) is None
            for load in (load_policy, load_tokenizer, lambda path: load_scorer(path / "value")):
                with pytest.raises(ValueError, match=f"model: expected a complete checkpoint, .* wrote {out}$"):
                    load(out)
            refused += 1
    assert renamed[-1] == "run.json" and refused > 6
    assert checkpoint.finished(out)["seconds"] == at + 1


def test_foreign_files_are_never_overwritten(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text("mine")
    assert checkpoint.foreign(directory) == {"config.json"} and checkpoint.foreign(tmp_path / "absent") == set()
    with pytest.raises(ValueError, match=r"directory: .* holds files that no checkpoint put there: config.json; what"):
        checkpoint.save(directory, models={"": LlamaForCausalLM(config())})
    assert sorted(os.listdir(directory)) == [".rlhf_fast-unsaved", "config.json"]
    assert (directory / "config.json").read_text() == "mine"
    assert os.listdir(tmp_path) == ["model"]
    sweep(directory)
    AutoModelForCausalLM.from_pretrained(directory / ".rlhf_fast-unsaved")  # what was to be saved is not lost
    (directory / "config.json").unlink()
    checkpoint.save(directory, models={"": LlamaForCausalLM(config())})
    assert checkpoint.foreign(directory) == set() and not (directory / ".rlhf_fast-unsaved").exists()


@pytest.mark.parametrize("why", ["empty", "mount", "parent", "others"])
def test_a_directory_that_stays_is_filled_from_inside(why, tmp_path, monkeypatch):
    target = tmp_path / "volume"
    target.mkdir()
    path = tmp_path / "link"
    path.symlink_to(target)
    if why != "empty":
        checkpoint.save(path, models={}, state={"step": 1})
    if why == "mount":
        monkeypatch.setattr(type(path), "is_mount", lambda self: True)
    if why == "parent":
        monkeypatch.setattr(os, "access", lambda directory, mode: directory != tmp_path)
    if why == "others":
        (target / "metrics.jsonl").write_text("{}\n")
    replace = os.replace

    def inside(source, to):
        assert Path(source).is_relative_to(target) and Path(to).is_relative_to(target)
        replace(source, to)

    monkeypatch.setattr(os, "replace", inside)
    checkpoint.save(path, models={}, state={"step": 2}, extra_files={"run.json": {}})
    assert path.is_symlink() and checkpoint.load_state(path) == {"step": 2}
    assert not hidden(target) and sorted(os.listdir(tmp_path)) == ["link", "volume"]


def test_a_half_deleted_checkpoint_is_never_a_checkpoint_again(tmp_path, monkeypatch):
    """A kill in the midst of pruning. A later run in the directory saves this step again."""
    for step in (1, 2):
        checkpoint.save(tmp_path / f"checkpoint-{step}", models={}, state={"step": step})

    def half(path):
        (path / "state.pt").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", half)
        checkpoint.prune(tmp_path, keep=1)
    assert hidden(tmp_path) == [".rlhf_fast-deleting-checkpoint-1"]
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-2"
    checkpoint.save(tmp_path / "checkpoint-1", models={}, state={"step": 1})  # as a run that begins anew does
    checkpoint.clear(tmp_path)
    assert os.listdir(tmp_path) == []


def test_sweeping_gives_back_what_nothing_has_replaced_and_leaves_folders_of_others(tmp_path):
    for name in (".new", ".old", ".checkpoint-3.new", ".rlhf_fast-unsaved"):
        (tmp_path / name).mkdir()
    theirs = sorted(os.listdir(tmp_path))
    for step in (1, 2):
        checkpoint.save(tmp_path / f"checkpoint-{step}", models={}, state={"step": step})
        shutil.copytree(tmp_path / f"checkpoint-{step}", tmp_path / f".rlhf_fast-replaced-checkpoint-{step}")
    shutil.rmtree(tmp_path / "checkpoint-1")
    (tmp_path / ".rlhf_fast-writing-1-metrics.jsonl").write_text("half")
    sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [*theirs, "checkpoint-1", "checkpoint-2"]
    assert checkpoint.load_state(tmp_path / "checkpoint-1") == {"step": 1}


def flipped(path: Path) -> None:
    """Flips a bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {"flipped": flipped, "cut": lambda path: os.truncate(path, path.stat().st_size // 2), "gone": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damaged_file_is_found(damage, tmp_path, tiny_model):
    """Each file of a checkpoint in turn: the checkpoint before it is taken, and a damaged model is not loaded."""
    model, tokens = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    models = {"": model, "value": LlamaForSequenceClassification(config(num_labels=1))}
    for step in (1, 2):
        checkpoint.save(tmp_path / f"checkpoint-{step}", models=models, tokenizer=tokens, state={"step": step})
    names = manifest.read(tmp_path / "checkpoint-2").files
    assert {"model.safetensors", "state.pt", "value/model.safetensors", "tokenizer.json"} <= names.keys()
    assert checkpoint.newest_whole(tmp_path) == (tmp_path / "checkpoint-2", [])
    load_policy(tmp_path / "checkpoint-2")
    for name in (*names, "checkpoint.json"):
        path, whole = tmp_path / "checkpoint-2" / name, (tmp_path / "checkpoint-2" / name).read_bytes()
        DAMAGES[damage](path)
        if name != "checkpoint.json":
            wrong = f"{name} is missing" if damage == "gone" else f"{name} has changed or is damaged"
            line = f"{tmp_path / 'checkpoint-2'}: {wrong}"
            assert checkpoint.newest_whole(tmp_path) == (tmp_path / "checkpoint-1", [line])
            if name != "state.pt":
                load = load_scorer if name.startswith("value") else load_policy
                with pytest.raises(ValueError, match=f"expected .*checkpoint-2 as it was saved, but {wrong}; after an"):
                    load(path.parent)
        else:  # the others' checksums are gone with it
            assert checkpoint.newest_whole(tmp_path)[0] == tmp_path / "checkpoint-1"
        path.write_bytes(whole)
    flipped(tmp_path / "checkpoint-1" / "state.pt")
    flipped(tmp_path / "checkpoint-2" / "state.pt")
    with pytest.raises(ValueError, match="resume: expected a checkpoint that is not damaged, got .*-2: state.pt has"):
        checkpoint.newest_whole(tmp_path)


def test_a_checkpoint_takes_the_place_of_a_damaged_one(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path / f"checkpoint-{step}", models={}, state={"step": step})
    (tmp_path / "checkpoint-2" / "checkpoint.json").write_text("[]")
    checkpoint.save(tmp_path / "checkpoint-2", models={}, state={"step": 22})
    assert checkpoint.load_state(tmp_path / "checkpoint-2") == {"step": 22}
    checkpoint.prune(tmp_path, keep=2, after=2)  # the run went on from checkpoint-1
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-1", "checkpoint-2"]


def test_a_linked_checkpoint_is_left_where_it_is(tmp_path):
    """Of a checkpoint that somebody moved to an archive, and linked, the link alone is deleted or replaced."""
    archive, out = tmp_path / "archive", tmp_path / "out"
    for step in (1, 2):
        checkpoint.save(archive / f"checkpoint-{step}", models={}, state={"step": step})
    out.mkdir()
    for step in (1, 2):
        (out / f"checkpoint-{step}").symlink_to(archive / f"checkpoint-{step}")
    assert checkpoint.newest_whole(out) == (out / "checkpoint-2", [])
    checkpoint.save(out / "checkpoint-2", models={}, state={"step": 22})
    checkpoint.prune(out, keep=1)
    assert os.listdir(out) == ["checkpoint-2"] and checkpoint.load_state(out / "checkpoint-2") == {"step": 22}
    assert [checkpoint.load_state(archive / f"checkpoint-{n}")["step"] for n in (1, 2)] == [1, 2]


@pytest.mark.parametrize(
    ("every", "keep", "there", "left", "at_the_end"),
    [
        (5, 2, (5, 10, 13), (5, 10, 13), (5, 10)),  # 13 is what a signal left
        (5, 2, (5, 10, 13, 15), (10, 15), (10, 15)),
        (0, 2, (3, 7), (7,), ()),
        (1, 2, (18, 19, 20), (19, 20), (18, 19)),  # a signal came in the last step
        (10, 1, (10, 20), (20,), (10,)),
    ],
)
def test_what_a_signal_left_does_not_stay(every, keep, there, left, at_the_end, tmp_path):
    for step in there:
        for directory in ("running", "ended"):
            checkpoint.save(tmp_path / directory / f"checkpoint-{step}", models={}, state={"step": step})
    checkpoint.prune(tmp_path / "running", keep, every=every)
    config = {"save_steps": every, "save_total_limit": keep}
    checkpoint.save(tmp_path / "ended", models={}, extra_files={"run.json": {"config": config, "steps": 20}})
    checkpoint.clean_up(tmp_path / "ended")
    for directory, wanted in (("running", left), ("ended", at_the_end)):
        names = {path.name for path in (tmp_path / directory).glob("checkpoint-*")}
        assert names == {f"checkpoint-{step}" for step in wanted}


def test_latest_and_prune(tmp_path):
    assert checkpoint.latest(tmp_path) is None and checkpoint.latest(tmp_path / "absent") is None
    for step in (2, 10, 9):
        checkpoint.save(tmp_path / f"checkpoint-{step}", models={}, state={"step": step})
    (tmp_path / "checkpoint-11").mkdir()  # half a directory of somebody else's making
    checkpoint.save(tmp_path / "checkpoint-12b", models={})
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"
    checkpoint.prune(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-10", "checkpoint-11", "checkpoint-12b", "checkpoint-9"]
    checkpoint.prune(tmp_path, keep=5)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-10"
    with pytest.raises(ValueError, match="keep: expected at least 1, got 0"):
        checkpoint.prune(tmp_path, keep=0)
    with pytest.raises(ValueError, match="found no .*checkpoint-11"):
        checkpoint.load_state(tmp_path / "checkpoint-11")


def draws() -> list[float]:
    return [random.random(), random.gauss(0, 1), *np.random.rand(2), np.random.randn(), *torch.rand(2).tolist()]
