"""Runs that end with an exception keep their last good step; what would lose a training is found before it."""

import dataclasses
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.config import PPOConfig, RLOOConfig, SFTConfig
from rlhf_fast.lm import manifest
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import ppo, rloo, sft
from rlhf_fast.training import checkpoint
from rlhf_fast.training.fingerprint import fingerprint
from rlhf_fast.training.learner import Learner
from rlhf_fast.training.listeners import Listener
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.stopped import Diverged, Stopped
from tests.support.stages import STAGES, distance, numbers, shortness, stage_config, weights


class Failing:
    """A reward whose call number `at` raises an exception."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, prompts, completions):
        self.calls += 1
        if self.calls == self.at:
            raise OSError("no server")
        return shortness(prompts, completions)


@pytest.mark.parametrize("at", [1, 3])
def test_an_exception_of_a_reward_keeps_the_last_good_step(at, files, tiny_model, tmp_path, capsys):
    config = stage_config(RLOOConfig, files, tiny_model, tmp_path / "cut", reward=Failing(at))
    with pytest.raises(Stopped, match=r"^reward reward raised OSError: no server \(test_stopped_runs.py, line \d+\)$"):
        rloo.train(config)
    assert checkpoint.latest(tmp_path / "cut") == (tmp_path / "cut" / "checkpoint-2" if at == 3 else None)
    assert ("RLOO: --resume goes on after step 2\n" in capsys.readouterr().err) == (at == 3)
    rloo.train(dataclasses.replace(config, reward=Failing(99), resume=True))
    rloo.train(dataclasses.replace(config, reward=Failing(99), output_dir=str(tmp_path / "whole")))
    assert distance(weights(tmp_path / "whole"), weights(tmp_path / "cut")) == 0
    assert numbers(tmp_path / "cut") == numbers(tmp_path / "whole")


def test_an_exception_in_an_evaluation_loses_no_step(files, tiny_model, tmp_path):
    """Calls 1 and 2 are the evaluation before the first step and step 1, call 3 is the evaluation after it."""
    config = stage_config(
        RLOOConfig, files, tiny_model, tmp_path, reward=Failing(3), steps=1, eval_data=files["prompts"]
    )
    with pytest.raises(Stopped, match="no server"):
        rloo.train(config)
    assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]
    rloo.train(dataclasses.replace(config, reward=Failing(99), resume=True))
    assert "eval/reward" in json.loads((tmp_path / "run.json").read_text())["evaluation"]


class Replacer(Listener):
    """Puts another directory in the place of the output directory after step 2."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def log(self, step, row):
        if step == 2:
            self.out.rename(self.out.with_name("moved"))
            self.out.mkdir()


def test_nothing_is_written_to_a_directory_that_has_taken_the_place(files, tiny_model, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(Stopped, match=f"^output_dir: expected {out} to stay while the run writes"):
        sft.train(stage_config(SFTConfig, files, tiny_model, out, save_steps=1), listeners=[Replacer(out)])
    assert not any(out.iterdir()) and checkpoint.latest(tmp_path / "moved")


@pytest.mark.parametrize("in_backward", [False, True])
def test_a_gradient_that_is_not_finite(in_backward, files, tiny_model, tmp_path, monkeypatch):
    """Weights that moved in backward are spoilt and not kept; else the state after step 2 is."""
    clip, calls = Learner.clip, []

    def spoil(self):
        calls.append(1)
        norm = clip(self)
        return norm * torch.nan if len(calls) == 3 else norm

    monkeypatch.setattr(Learner, "clip", spoil)
    options = {"max_grad_norm": 0, "optimizer_in_backward": in_backward}
    with pytest.raises(Stopped, match="^gradient norm is nan; the weights were (left as they are|spoilt)") as stopped:
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path, **options))
    kept = tmp_path / "checkpoint-2"
    assert checkpoint.latest(tmp_path) == (None if in_backward else kept)
    saved = f"{kept} is saved, and --resume goes on from there; with a smaller learning_rate, start anew with --model"
    nothing = "nothing is saved, because save_steps is 0; try a smaller learning_rate"
    assert str(stopped.value).endswith(f"; {nothing}" if in_backward else f"; {saved} {kept}")


@pytest.mark.parametrize("name", ["sft", "remax", "dpo"])
@pytest.mark.parametrize("last", [False, True])
def test_weights_that_are_not_finite_replace_no_good_ones(name, last, files, tiny_model, tmp_path, monkeypatch, capsys):
    """A step makes them, with a checkpoint due or as the last step: the checkpoint of the step before is what stays."""
    module, cls = STAGES[name]
    apply, calls = Learner.apply, []

    def overflow(self):
        apply(self)
        calls.append(1)
        if len(calls) == broken:
            with torch.no_grad():
                self.model.lm_head.weight[0, 0] = torch.inf

    monkeypatch.setattr(Learner, "apply", overflow)
    config = stage_config(cls, files, tiny_model, tmp_path / "out", save_steps=1)
    rows = len(Path(str(config.train_data)).read_text().splitlines())
    broken = 3 if not last else config.steps if name == "remax" else rows // config.batch_size
    with pytest.raises(Diverged, match=r"^\S+ is not finite, so that it was not written to ") as stopped:
        module.train(config)
    kept = tmp_path / "out" / f"checkpoint-{broken - 1}"
    assert f"; {kept} is saved, and --resume goes on from there; with a smaller" in str(stopped.value)
    assert checkpoint.latest(tmp_path / "out") == kept and not checkpoint.finished(tmp_path / "out")
    assert all(x.isfinite().all() for x in weights(kept).values())
    assert "could be written" not in capsys.readouterr().err


def test_a_learning_rate_that_no_float_holds(files, tiny_model, tmp_path, capsys):
    """The one step of the run, on the command line: exit code 1, one line, no model."""
    flags = ["--model", tiny_model, "--train-data", files["sft"], "--output-dir", str(tmp_path / "out")]
    flags += ["--learning-rate", "1e38", "--batch-size", "32", "--max-length", "32", "--lr-schedule", "constant"]
    assert cli.main(["sft", *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert "is not finite" in last or "gradient norm is nan" in last
    assert "; nothing is saved, because save_steps is 0; try a smaller learning_rate" in last
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_whole_updates_of_a_broken_step_are_kept(files, tiny_model, tmp_path, monkeypatch, capsys):
    """The second of four updates of step 2 is not finite. The first stays, and the schedule starts at step 1's end."""
    check, calls = Learner.check, []

    def fail(self, norm):
        calls.append(1)
        check(self, norm if len(calls) != 11 else float("nan"))

    monkeypatch.setattr(Learner, "check", fail)
    options = {"steps": 3, "epochs": 2, "minibatches": 2, "lr_schedule": "linear"}
    with pytest.raises(Stopped, match="^gradient norm is nan"):
        ppo.train(stage_config(PPOConfig, files, tiny_model, tmp_path, **options))
    kept = tmp_path / "checkpoint-1"
    assert f"PPO: wrote the state after step 1, with updates of step 2 to {kept}\n" in capsys.readouterr().err
    assert checkpoint.load_state(kept)["policy"]["scheduler"]["last_epoch"] == 4
    load_policy(kept)


def test_the_command_prints_one_line(files, tiny_model, tmp_path, capsys):
    (tmp_path / "f.py").write_text("def f(completions):\n    return {}[1]\n")
    flags = ["--model", tiny_model, "--reward", f"{tmp_path}/f.py:f", "--train-data", files["prompts"]]
    flags += ["--output-dir", str(tmp_path / "out"), "--batch-size", "8", "--max-response-length", "4"]
    assert cli.main(["rloo", *flags]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"rlhf-fast: reward {tmp_path}/f.py:f raised KeyError: 1 (f.py, line 2) (--debug shows where)"


def edited(model: str, target: Path, file: str, **keys) -> str:
    """A copy of a checkpoint with other values in a JSON file."""
    target.mkdir()
    for path in Path(model).iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    content = json.loads((target / file).read_text()) if (target / file).exists() else {}
    (target / file).write_text(json.dumps({**content, **keys}))
    return str(target)


def test_what_cannot_be_saved_is_found_before_the_first_step(files, tiny_model, tmp_path, monkeypatch):
    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    checkpoint.check_savable([model], tokenizer)
    model.generation_config.temperature = 0.5  # without sampling
    with pytest.raises(ValueError, match="^model: expected a generation config that can be saved, mend generation_con"):
        checkpoint.check_savable([model], tokenizer)
    vars(model.config)["_output_attentions"] = True  # with an attention that has no weights to return
    with pytest.raises(ValueError, match="^model: expected a config that can be saved, mend config.json: .*eager"):
        checkpoint.check_savable([model], tokenizer)
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda self, directory: [][0])
    with pytest.raises(ValueError, match="^model: expected a tokenizer that can be saved, mend its files: list index"):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "out"))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_what_a_config_asks_to_return_changes_nothing(files, tiny_model, tmp_path):
    asks = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    model = edited(tiny_model, tmp_path / "m", "config.json", **asks)
    for name, start in (("a", tiny_model), ("b", model)):
        rloo.train(stage_config(RLOOConfig, files, start, tmp_path / name, steps=2))
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b")


@pytest.mark.parametrize("in_memory", [False, True])
def test_data_that_changed_is_refused_on_resume(in_memory, files, tiny_model, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text(Path(files["prompts"]).read_text())
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    config = stage_config(RLOOConfig, files, tiny_model, tmp_path / "out", reward=Failing(3))
    config = dataclasses.replace(config, train_data=rows if in_memory else str(data))
    with pytest.raises(Stopped):
        rloo.train(config)
    again = dataclasses.replace(config, reward=Failing(99), resume=True)
    rows[0]["prompt"] += " !"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match="^train_data: expected the rows of the run to resume, .* content of .* chang"):
        rloo.train(again)
    data.write_text(Path(files["prompts"]).read_text())
    rows[0]["prompt"] = rows[0]["prompt"].removesuffix(" !")
    rloo.train(again)


def test_another_model_or_reward_behind_the_same_path_is_refused_on_resume(files, tiny_model, tmp_path, capsys):
    """Model, reference and reward's file, each changed where it stands; a mended reward goes on where it is named."""
    paths = {name: tmp_path / name for name in ("model", "reference")}
    for path in paths.values():
        shutil.copytree(tiny_model, path)
    broken = "def score(completions):\n    return [float(len(c)) for c in completions]\n"
    (tmp_path / "f.py").write_text(broken)
    config = stage_config(RLOOConfig, files, str(paths["model"]), tmp_path / "out", reward=f"{tmp_path}/f.py:score")
    config = dataclasses.replace(config, reference=str(paths["reference"]), save_steps=2)
    rloo.train(config)
    again = dataclasses.replace(config, resume=True)
    shutil.copytree(tmp_path / "model", tmp_path / "elsewhere")
    rloo.train(dataclasses.replace(again, model=str(tmp_path / "elsewhere")))  # the same model in another place
    for name, path in paths.items():
        file = path / "generation_config.json"
        kept = file.read_text()
        file.write_text(kept + " ")
        with pytest.raises(
            ValueError, match=f"^{name}: expected the model of the run to resume, .*content of .*{name} h"
        ):
            rloo.train(again)
        file.write_text(kept)
    (tmp_path / "f.py").write_text(f"# mended\n{broken}")
    with pytest.raises(
        ValueError, match="^reward: expected the reward of .* has changed; --accept-changed reward goes"
    ):
        rloo.train(again)
    capsys.readouterr()
    rloo.train(dataclasses.replace(again, accept_changed=["reward"]))
    line = "the content of reward has changed since checkpoint-2; the run goes on with it"
    assert f"RLOO: {line}\n" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "run.json").read_text())["resumed"] == [line]
    with pytest.raises(ValueError, match="accept_changed: expected some of train_data, .*, got .'seed'"):
        dataclasses.replace(again, accept_changed=["seed"])


MENDED = "def score(completions):\n    return [float(len(c)) for c in completions]\n"


@pytest.mark.parametrize(
    "fault", ["raise ValueError('boom')", "raise KeyboardInterrupt", "return [float('nan')] * len(completions)"]
)
def test_a_reward_function_that_ended_a_run_may_be_mended(fault, files, tiny_model, tmp_path, capsys):
    reward, out = tmp_path / "f.py", tmp_path / "out"
    calls = f"calls = []\ndef score(completions):\n    calls.append(1)\n    if len(calls) == 4:\n        {fault}\n"
    reward.write_text(calls + "    return [float(len(c)) for c in completions]\n")
    config = stage_config(RLOOConfig, files, tiny_model, out, reward=f"{reward}:score", save_steps=2)
    config = dataclasses.replace(config, eval_data=None, steps=6)
    with pytest.raises((RuntimeError, ValueError, KeyboardInterrupt)):
        rloo.train(config)
    kept = checkpoint.latest(out).name
    assert kept == ("checkpoint-2" if "Keyboard" in fault else "checkpoint-3")
    reward.write_text(MENDED)
    capsys.readouterr()
    again = dataclasses.replace(config, resume=True)
    rloo.train(again)
    assert f"RLOO: the content of reward has changed since {kept}; the run goes on with it\n" in capsys.readouterr().err
    whole = dataclasses.replace(config, output_dir=str(tmp_path / "whole"))
    rloo.train(whole)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert not [name for name in os.listdir(out) if name.startswith(".")]
    reward.write_text(f"# other\n{MENDED}")
    with pytest.raises(ValueError, match="--accept-changed reward goes on with it"):
        rloo.train(again)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda state: [], "expected a training state, got list"),
        (lambda state: torch.zeros(3), "expected a training state, got Tensor"),
        (lambda state: {k: v for k, v in state.items() if k != "step"}, "expected the state of step, found none"),
        (lambda state: state | {"step": "2"}, "expected step of type int, got str"),
        (
            lambda state: state | {"step": 10**9},
            "expected the state after the step of checkpoint-2, got step 1000000000",
        ),
        (lambda state: state | {"metrics": None}, "expected metrics of type str, got NoneType"),
    ],
)
def test_a_state_that_somebody_edited(edit, said, files, tiny_model, tmp_path):
    config = stage_config(SFTConfig, files, tiny_model, tmp_path, save_steps=2)
    sft.train(config)
    checkpoint.delete(tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-2" / "state.pt"
    torch.save(edit(torch.load(file, weights_only=True)), file)
    manifest.write(file.parent, manifest.of_files(file.parent))
    with pytest.raises(ValueError, match=f"^{re.escape(str(file))}: {said}$"):
        sft.train(dataclasses.replace(config, resume=True))


def test_fingerprints_are_of_content(tmp_path):
    rows = [{"prompt": "a"}, {"prompt": "b"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.jsonl").write_text(text)
        (tmp_path / folder / "b.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=len(folder)))
    one = fingerprint(tmp_path / "x" / "a.jsonl")
    assert one == fingerprint(tmp_path / "x" / "b.jsonl.gz") == fingerprint(str(tmp_path / "x" / "*.jsonl"))
    assert fingerprint(tmp_path / "x") == fingerprint(tmp_path / "y") != one
    assert fingerprint(rows) == fingerprint(list(map(dict, rows))) != fingerprint(rows[::-1])
    assert fingerprint(iter(rows)) is None and fingerprint("no/such:file") is None
