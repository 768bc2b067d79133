"""The run around the steps: nothing trained is lost at its end, a resumed run is the same, run.json is right."""

import dataclasses
import errno
import json
import os
import shutil
from pathlib import Path

import datasets
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_fast.config import DPOConfig, ReMaxConfig, RewardConfig, RLOOConfig, SFTConfig
from rlhf_fast.data.encoding import load_rows
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.stages import dpo, remax, reward, rloo, sft
from rlhf_fast.training import checkpoint
from rlhf_fast.training.metrics import read_metrics
from tests.support.stages import REWARD, STAGES, distance, interrupted, shortness, stage_config, weights


def run_json(directory) -> dict:
    return json.loads((Path(directory) / "run.json").read_text())


@pytest.mark.parametrize(
    ("field", "value", "described"),
    [
        ("output_dir", Path, None),
        ("model", Path, None),
        ("train_data", lambda path: load_rows(path, "sft"), "<96 rows>"),
        ("train_data", lambda path: datasets.Dataset.from_list(load_rows(path, "sft")), "<96 rows>"),
        ("train_data", lambda path: iter(load_rows(path, "sft")), "<list_iterator>"),
    ],
)
def test_paths_and_data_in_memory(field, value, described, files, tiny_model, tmp_path):
    config = stage_config(SFTConfig, files, tiny_model, tmp_path / "out", save_steps=2)
    given = getattr(config, field)
    sft.train(dataclasses.replace(config, **{field: value(given)}))
    assert run_json(tmp_path / "out")["config"][field] == (described or given)


def test_a_function_as_reward(files, tiny_model, tmp_path):
    rloo.train(stage_config(RLOOConfig, files, tiny_model, tmp_path, steps=1, reward=shortness))
    assert run_json(tmp_path)["config"]["reward"] == f"{shortness.__module__}:shortness"


def test_output_directory_on_another_file_system(files, tiny_model, tmp_path, monkeypatch):
    """A symlink to a folder into which nothing outside can be renamed."""
    other, replace = tmp_path / "other", os.replace

    def replace_within(source, target):
        if Path(source).resolve().is_relative_to(other) != Path(target).parent.resolve().is_relative_to(other):
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), source, None, target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_within)
    (other / "out").mkdir(parents=True)
    (tmp_path / "out").symlink_to(other / "out")
    sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "out", save_steps=2))
    load_policy(tmp_path / "out")
    assert (other / "out" / "run.json").is_file() and sorted(os.listdir(tmp_path)) == ["other", "out"]


def test_files_of_another_program_are_found_before_the_first_step(files, tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(ValueError, match="output_dir: expected no model that another program wrote, found config.json"):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path))
    assert sorted(os.listdir(tmp_path)) == before


@pytest.mark.parametrize("field", ["model", "reference", "reward", "eval_reward", "train_data", "base", "checkpoint"])
def test_a_run_writes_to_no_directory_that_it_reads(field, files, tiny_model, tmp_path):
    """`base`: that of an adapter. `checkpoint`: one that the run would delete when it begins."""
    out, options = tmp_path / "out", {"eval_data": files["prompts"]}
    shutil.copytree(tiny_model, out / "checkpoint-4" if field == "checkpoint" else out)
    (tmp_path / "link").symlink_to(out)
    if field == "base":
        checkpoint.save(tmp_path / "adapter", models={"": load_policy(out, lora=LoRA(2, 4.0, 0))})
        options["model"] = str(tmp_path / "adapter")
    elif field == "checkpoint":
        options["model"] = str(out / "checkpoint-4")
    else:
        options[field] = str(tmp_path / "link")
    config = dataclasses.replace(stage_config(ReMaxConfig, files, tiny_model, out), **options)
    name, read = (field, "it") if field in options else ("model", "it" if field == "base" else out / "checkpoint-4")
    message = f"output_dir: expected a directory that the run does not read, got {out}, but {name} reads {read}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        remax.train(config)


def test_a_reward_model_outlives_its_normalisation(files, tiny_model, tmp_path, monkeypatch):
    options = {"eval_data": files["pairs"], "normalize_samples": 8}
    config = stage_config(RewardConfig, files, tiny_model, tmp_path / "cut", **options)
    reward.train(dataclasses.replace(config, output_dir=str(tmp_path / "whole")))
    assert checkpoint.latest(tmp_path / "whole") is None
    monkeypatch.setattr(reward, "normalize", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reward.train(config)
    monkeypatch.undo()
    assert checkpoint.latest(tmp_path / "cut").name == "checkpoint-6"
    monkeypatch.setattr(reward, "preference_loss", lambda *_: 1 / 0)  # nothing is trained or evaluated again
    reward.train(dataclasses.replace(config, resume=True))
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
    assert checkpoint.latest(tmp_path / "cut") is None
    whole, cut = run_json(tmp_path / "whole"), run_json(tmp_path / "cut")
    for name in ("score_offset", "eval/accuracy", "static_bytes", "rows"):
        assert whole[name] == cut[name], name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 8}, "batch_size: expected 16 as in the run to resume, .*checkpoint-2, got 8"),
        ({"seed": 1}, "seed: expected 0 as in the run to resume"),
        ({"learning_rate": 1e-3}, "learning_rate: expected 0.002 as in the run to resume"),
        ({"reward": f"{__file__}:score"}, "reward: expected .*shortness"),
        ({"steps": 3}, "steps: expected 4 as in the run to resume"),
        ({"steps": 6, "lr_schedule": "linear"}, "lr_schedule: expected 'constant'"),
    ],
)
def test_another_config_cannot_resume(change, message, files, tiny_model, tmp_path):
    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, save_steps=2)
    remax.train(config)
    with pytest.raises(ValueError, match=message):
        remax.train(dataclasses.replace(config, resume=True, **change))
    assert run_json(tmp_path)["config"]["resume"] is False  # the finished run is untouched


def test_a_decaying_run_cannot_be_made_longer(files, tiny_model, tmp_path):
    config = stage_config(SFTConfig, files, tiny_model, tmp_path, save_steps=2, lr_schedule="linear")
    sft.train(config)
    with pytest.raises(ValueError, match="epochs: expected 1 as in the run to resume"):
        sft.train(dataclasses.replace(config, resume=True, epochs=2))


@pytest.mark.parametrize(("name", "longer"), [("sft", {"epochs": 2}), ("remax", {"steps": 6})])
def test_a_constant_run_made_longer_is_the_longer_run(name, longer, files, tiny_model, tmp_path):
    module, cls = STAGES[name]
    config = stage_config(cls, files, tiny_model, tmp_path / "cut", save_steps=2)
    module.train(config)
    module.train(dataclasses.replace(config, resume=True, save_steps=0, track=["tensorboard"], **longer))
    module.train(dataclasses.replace(config, output_dir=str(tmp_path / "whole"), **longer))
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0


def test_run_json_covers_the_whole_run(files, tiny_model, tmp_path):
    config = stage_config(DPOConfig, files, tiny_model, tmp_path / "whole", save_steps=4, epochs=1)
    config = dataclasses.replace(config, eval_data=files["prompts"], eval_reward=REWARD, eval_steps=2)
    dpo.train(config)
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    dpo.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    for directory in (tmp_path / "whole", cut):
        run, history = run_json(directory), read_metrics(directory / "metrics.jsonl")
        phases, steps = run["phases"], [row for row in history if row["step"] > 0]
        assert run["steps"] == phases["steps"] == len(steps) == 6
        assert phases["step_seconds"] == pytest.approx(sum(row["time/step"] for row in steps))
        assert phases["policy_update"]["count"] == 6
        assert phases["policy_update"]["peak_bytes"] == max(row.get("memory/policy_update", 0) for row in steps)
        assert phases["evaluation"]["count"] == 4  # the one before the first step is timed, but is no step


def test_a_damaged_checkpoint_is_passed_over(files, tiny_model, tmp_path, capsys):
    """The last bit of the optimizer's state is flipped; the run from the checkpoint before ends in the same weights."""
    config = stage_config(SFTConfig, files, tiny_model, tmp_path / "cut", save_steps=2)
    sft.train(config)
    (tmp_path / "cut" / "model.safetensors").rename(tmp_path / "whole.safetensors")
    assert sorted(path.name for path in (tmp_path / "cut").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    state = tmp_path / "cut" / "checkpoint-4" / "state.pt"
    state.write_bytes(state.read_bytes()[:-1] + b"x")
    capsys.readouterr()
    sft.train(dataclasses.replace(config, resume=True))
    said = f"SFT: {state.parent}: state.pt has changed or is damaged; the run goes on from checkpoint-2\n"
    assert capsys.readouterr().err.count(said) == 1
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert checkpoint.newest_whole(tmp_path / "cut") == (state.parent, [])


def test_the_longest_name_is_written(files, tiny_model, tmp_path):
    out = tmp_path / ("n" * 255)
    sft.train(stage_config(SFTConfig, files, tiny_model, out, save_steps=4))
    load_policy(out)
    assert checkpoint.newest_whole(out)[0] == out / "checkpoint-4"


@pytest.mark.parametrize("name", ["run.json", "samples.json", "metrics.jsonl"])
def test_a_run_of_another_program_is_not_overwritten(name, files, tiny_model, tmp_path):
    (tmp_path / name).write_text('{"mine": 1}\n')
    message = f"output_dir: expected no run that another program wrote, found {name} in {tmp_path}"
    with pytest.raises(ValueError, match=message):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path))
    assert os.listdir(tmp_path) == [name] and (tmp_path / name).read_text() == '{"mine": 1}\n'


@pytest.mark.parametrize("harm", ["a row is missing", "a number differs", "garbage", "no file"])
def test_harmed_metrics_are_restored_from_the_checkpoint(harm, files, tiny_model, tmp_path, capsys):
    config = stage_config(SFTConfig, files, tiny_model, tmp_path, save_steps=4)
    sft.train(config)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    first = lines[0].replace('"step": 1,', '"step": 1, "x": 0,')
    path.unlink()
    if harm != "no file":
        harmed = {"a row is missing": lines[1:], "a number differs": [first, *lines[1:]], "garbage": ["\0{", *lines]}
        path.write_text("".join(harmed[harm]))
    sft.train(dataclasses.replace(config, resume=True))
    assert path.read_text().splitlines(keepends=True)[:4] == lines[:4]
    said = f"SFT: {path} does not hold the metrics of the steps up to 4 as they were written; restored them\n"
    assert said in capsys.readouterr().err
    sft.train(dataclasses.replace(config, resume=True))
    assert "restored" not in capsys.readouterr().err


def test_nothing_to_resume_is_said(files, tiny_model, tmp_path, capsys):
    config = stage_config(SFTConfig, files, tiny_model, tmp_path)
    sft.train(config)
    assert "resume" not in capsys.readouterr().err
    sft.train(dataclasses.replace(config, resume=True))
    assert f"SFT: no checkpoint to resume in {tmp_path}, starts anew\n" in capsys.readouterr().err


def test_truncated_rows_are_said(files, tiny_model, tmp_path, capsys):
    sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "a", max_length=4))
    assert "SFT: 96 of 96 rows are too long and were truncated\n" in capsys.readouterr().err
    rloo.train(stage_config(RLOOConfig, files, tiny_model, tmp_path / "b", steps=1, max_prompt_length=1))
    assert "RLOO: 32 of 32 prompts are too long and were truncated\n" in capsys.readouterr().err
    sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "c", max_prompt_length=64))
    assert "truncated" not in capsys.readouterr().err


def test_the_samples_of_an_offline_method_are_drawn_as_an_online_method_draws_its_own(files, tiny_model, tmp_path):
    options = {"eval_data": files["prompts"], "temperature": 0.3, "top_k": 3, "max_response_length": 6}
    rloo.train(stage_config(RLOOConfig, files, tiny_model, tmp_path / "a", steps=1, seed=4, **options))
    dpo.train(stage_config(DPOConfig, files, tiny_model, tmp_path / "b", seed=4, eval_reward=REWARD, **options))
    online, offline = (json.loads((tmp_path / name / "samples_before.json").read_text()) for name in ("a", "b"))
    assert online == offline and len({row["completion"] for row in offline}) > 1


def test_held_out_prompts_alone_are_evaluated_before_and_after(files, tiny_model, tmp_path):
    config = stage_config(RLOOConfig, files, tiny_model, tmp_path, steps=3, eval_data=files["prompts"])
    rloo.train(config)
    evaluated = [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl") if "eval/reward" in row]
    assert evaluated == [0, 3] and run_json(tmp_path)["evaluation"]
    with pytest.raises(ValueError, match="eval_data: expected held-out prompts because eval_steps > 0, got none"):
        rloo.train(dataclasses.replace(config, eval_data=None, eval_steps=1))
