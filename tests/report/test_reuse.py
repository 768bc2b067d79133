"""What a resumed pipeline takes of an earlier run: only what was made with just this."""

import dataclasses
import json
import shutil
from functools import partial

import pytest

from rlhf_fast.data import rows as data_rows
from rlhf_fast.lm import manifest
from rlhf_fast.report import pipeline, reuse
from rlhf_fast.report.reuse import make_pairs
from rlhf_fast.training import checkpoint
from rlhf_fast.training.made import FREE, made_with
from tests.support.pipelines import pipeline_config
from tests.support.ranks import results_of, start
from tests.support.stages import LENGTHS, REWARD, shortness


def test_a_stage_made_with_something_else_is_made_anew(files, tiny_model, tmp_path, capsys, monkeypatch):
    """Each edit between two resumptions: a setting of SFT, a reward's file, an earlier run's stages, a moved directory.

    What depends on an edited stage is made anew too, because the model that it starts from is another one.
    """
    (tmp_path / "words.py").write_text(f"from {shortness.__module__} import shortness as score\n")
    monkeypatch.setattr(reuse, "load", lambda path: trained)
    options = {"methods": ["remax"], "pairs": {}, "reward": {"train_data": files["pairs"]}}
    options["remax"] = {"reward": f"{tmp_path}/words.py:score"}
    out, seeds = tmp_path / "out", []

    def made_anew(directory=out, **more):
        config = pipeline_config(files, tiny_model, directory, **{**options, **more})
        capsys.readouterr()
        pipeline.run_stages(config)
        lines = [line.split(": made anew, because ") for line in capsys.readouterr().out.splitlines()]
        names = ("sft", "reward", "remax")
        seeds[:] = [json.loads((directory / name / "run.json").read_text())["config"]["seed"] for name in names]
        return {name: why.rstrip(".") for name, why in lines}

    assert made_anew() == {}
    assert made_anew(resume=True) == {} and seeds == [5, 5, 5]
    sft = {"train_data": files["sft"], "batch_size": 16, "max_length": 48, "learning_rate": 1e-3}
    content = f"the content of model, '{out}/sft', has changed"
    rate = "learning_rate is 0.001 and was 1e-05"
    assert made_anew(resume=True, sft=sft) == {"sft": rate, "reward": content, "remax": content}
    options["sft"] = sft
    with open(tmp_path / "words.py", "a") as file:
        file.write("# another file\n")
    changed = f"the content of reward, '{tmp_path}/words.py:score', has changed"
    assert made_anew(resume=True) == {"remax": changed}
    # a second run in the directory is killed when it has made its first stage
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "make_stage", partial(dies_after_sft, reuse.make_stage))
        made_anew(seed=6)
    assert list(made_anew(seed=6, resume=True)) == ["reward", "remax"] and seeds == [6, 6, 6]
    out.rename(tmp_path / "moved")
    assert made_anew(tmp_path / "moved", seed=6, resume=True) == {}
    # a crash in the final save over an earlier run's model
    incomplete = manifest.read(tmp_path / "moved" / "sft")._replace(complete=False)
    manifest.write(tmp_path / "moved" / "sft", incomplete)
    assert made_anew(tmp_path / "moved", seed=6, resume=True) == {}  # the same SFT model again
    assert checkpoint.finished(tmp_path / "moved" / "sft")


def test_the_last_stages_directory_is_looked_at_first(files, tiny_model, tmp_path):
    """An unfinished run in it, and a stage that would write to what it reads, are found before SFT runs."""
    checkpoint.save(tmp_path / "dpo" / "checkpoint-2", models={}, state={"step": 2})
    with pytest.raises(ValueError, match="output_dir: expected no unfinished run, found .*dpo/checkpoint-2; continue"):
        pipeline.run(pipeline_config(files, tiny_model, tmp_path, methods=["dpo"], common={}))
    options = {"methods": ["ppo"], "ppo": {"value_model": str(tmp_path / "ppo")}}
    shutil.copytree(tiny_model, tmp_path / "ppo")
    with pytest.raises(ValueError, match="a directory that the run does not read, got .*ppo, but value_model reads it"):
        pipeline.run(pipeline_config(files, tiny_model, tmp_path, **options))
    assert not (tmp_path / "sft").exists()


def trained(config):
    """In place of a stage: a model that follows from the config and from the content of what the stage reads."""
    record = made_with(config)
    follows = {name: record["made_of"].get(name, value) for name, value in record["config"].items() if name not in FREE}
    checkpoint.save(config.output_dir, models={}, extra_files={"run.json": record, "config.json": follows})


def dies_after_sft(make, name, config):
    if name != "sft":
        raise KeyboardInterrupt
    make(name, config)


def test_pairs_are_made_anew_for_another_scale_or_where_others_are_in_their_place(files, tiny_model, tmp_path, capsys):
    note = tmp_path / "pairs.json"
    plan = pipeline.make_plan(pipeline_config(files, tiny_model, tmp_path, sft=None))["pairs"]
    make_pairs(plan, note, resume=True)
    make_pairs(plan, note, resume=True)
    assert capsys.readouterr().out == ""
    make_pairs(dataclasses.replace(plan, scale=2.0), note, resume=True)
    assert capsys.readouterr().out == "pairs: made anew, because scale is 2.0 and was 1.0\n"
    data_rows.write_rows(plan.eval_output, [])
    make_pairs(dataclasses.replace(plan, scale=2.0), note, resume=True)
    assert capsys.readouterr().out == "pairs: made anew, because other files are in the place of the pairs\n"


def test_several_processes_take_and_make_anew_the_same_stages(files, tiny_model, tmp_path):
    """One process alone clears what is made anew, after all of them have looked at it."""
    options = {"train_data": files["prompts"], "steps": 1, "batch_size": 4, "learning_rate": 1e-4, **LENGTHS}
    config = {"model": tiny_model, "output_dir": str(tmp_path / "out"), "methods": ["reinforce"], "resume": True}
    config |= {"sft": {"train_data": files["sft"], "batch_size": 32, "max_length": 48}, "reward": None}
    said = []
    for seed in (1, 1, 2):
        config |= {"common": {**options, "reward": REWARD}, "seed": seed}
        (tmp_path / "pipeline.yaml").write_text(json.dumps(config))
        results = results_of(start(2, "-m", "rlhf_fast", "pipeline", "--config", str(tmp_path / "pipeline.yaml")))
        assert [result.returncode for result in results] == [0, 0], results[0].stderr
        said.append([line.split(",")[0] for line in results[0].stdout.splitlines() if "made anew" in line])
        assert results[1].stdout == ""
    assert said == [[], [], ["sft: made anew", "reinforce: made anew"]]
