"""What a config refuses when it is built in Python, and how JSON describes one."""

import dataclasses
import functools
import json
from pathlib import Path

import datasets
import pytest

from rlhf_fast.config import (
    DPOConfig,
    InitConfig,
    PairsConfig,
    PipelineConfig,
    PPOConfig,
    ReMaxConfig,
    RLOOConfig,
    SFTConfig,
)
from rlhf_fast.config.arguments import check_file, from_dict, parse
from rlhf_fast.config.fields import describe
from rlhf_fast.report.pipeline import make_plan

STAGE = {"model": "m", "output_dir": "o", "train_data": "t.jsonl"}
ONLINE = {**STAGE, "reward": "f.py:score"}
PAIRS = {"model": "m", "prompts": "p.jsonl", "reward": "f.py:score", "output": "pairs.jsonl"}
INIT = {"model_config": "c.json", "data": ["d.jsonl"], "text_columns": ["text"], "output_dir": "o"}


@pytest.mark.parametrize(
    ("cls", "given", "wrong", "message"),
    [
        (SFTConfig, STAGE, {"optimizer": "sgd"}, "optimizer: expected one of adamw, adamw_8bit, got 'sgd'"),
        (SFTConfig, STAGE, {"lr_schedule": "foo"}, "lr_schedule: expected one of constant, linear, cosine, got 'foo'"),
        (PPOConfig, ONLINE, {"critic": "foo"}, "critic: expected one of model, shared, got 'foo'"),
        (ReMaxConfig, ONLINE, {"variant": "foo"}, "variant: expected one of official, paper, verl, got 'foo'"),
        (DPOConfig, STAGE, {"loss_type": "foo"}, "loss_type: expected one of sigmoid, robust, .*, got 'foo'"),
        (DPOConfig, STAGE, {"label_smoothing": 2}, r"label_smoothing: expected a number in \[0, 1\] .* sigmoid, got 2"),
        (DPOConfig, STAGE, {"loss_type": "robust", "label_smoothing": 0.5}, r"a number in \[0, 0.5\) for loss_type"),
        (DPOConfig, STAGE, {"loss_type": "exo_pair"}, r"a number in \(0, 1\) for loss_type exo_pair, got 0.0"),
        (DPOConfig, STAGE, {"loss_type": "ipo", "label_smoothing": 0.1}, "expected 0, as it has none, for .* ipo"),
        (DPOConfig, STAGE, {"eval_data": "e.jsonl"}, "eval_reward: expected a reward to score .* eval_data with, got"),
        (SFTConfig, STAGE, {"learning_rate": "1e-3"}, "learning_rate: expected a number, got '1e-3'"),
        (SFTConfig, STAGE, {"batch_size": 4.0}, "batch_size: expected an integer, got 4.0"),
        (SFTConfig, STAGE, {"batch_size": True}, "batch_size: expected an integer, got True"),
        (SFTConfig, STAGE, {"micro_batch_size": "4"}, "micro_batch_size: expected an integer, got '4'"),
        (SFTConfig, STAGE, {"epochs": None}, "epochs: expected an integer, got None"),
        (SFTConfig, STAGE, {"bf16": 1}, "bf16: expected true or false, got 1"),
        (SFTConfig, STAGE, {"seed": -1}, r"seed: expected an integer from 0 to 2\^63 - 1, got -1"),
        (SFTConfig, STAGE, {"columns": {"prompt": 1}}, "columns: expected names of our columns with names in the data"),
        (SFTConfig, STAGE, {"columns": ["prompt"]}, "columns: expected names of our columns with names in the data"),
        (SFTConfig, STAGE, {"chat_template_kwargs": "a"}, "chat_template_kwargs: expected named options, got 'a'"),
        (PairsConfig, PAIRS, {"chat_template_kwargs": {"tokenize": 1}}, "options of the template, got tokenize, which"),
        (InitConfig, INIT, {"seed": 2**63}, "seed: expected an integer from 0"),
        (PairsConfig, PAIRS, {"seed": -1}, "seed: expected an integer from 0"),
        (PairsConfig, PAIRS, {"batch_size": -1}, "batch_size: expected an integer >= 1, got -1"),
        (PairsConfig, PAIRS, {"max_rows": -1}, "max_rows: expected an integer >= 1, got -1"),
        (PairsConfig, PAIRS, {"eval_rows": -1, "eval_output": "e.jsonl"}, "eval_rows: expected an integer >= 0"),
        (PairsConfig, PAIRS, {"temperature": 0.0}, r"temperature: expected a number in \[1e-30, 1e\+30\], got 0.0"),
        (PairsConfig, PAIRS, {"scale": -1.0}, "scale: expected a number >= 0, got -1.0"),
        (PairsConfig, PAIRS, {"output": "pairs.txt"}, "output: expected a .jsonl or .jsonl.gz file, got 'pairs.txt'"),
        (PairsConfig, PAIRS, {"eval_output": "e.json", "eval_rows": 1}, "eval_output: expected a .jsonl or .jsonl.gz"),
    ],
)
def test_wrong_values_are_named(cls, given, wrong, message):
    cls(**given)
    with pytest.raises(ValueError, match=message):
        cls(**given | wrong)


def test_an_integer_is_a_number_and_optional_fields_may_be_none():
    assert PPOConfig(**ONLINE, kl_coef=0, kl_target=6, value_model=None).kl_target == 6


def score(prompts, completions, **columns):
    return [0.0] * len(prompts)


class Scorer:
    __call__ = staticmethod(score)


ROWS = [{"prompt": "a"}, {"prompt": "b"}]


@pytest.mark.parametrize(
    ("given", "described"),
    [
        ({"model": Path("some/model")}, "some/model"),
        ({"reward": score}, f"{__name__}:score"),
        ({"reward": lambda prompts, completions: []}, f"{__name__}:<lambda>"),
        ({"reward": functools.partial(score)}, "functools:partial"),
        ({"reward": Scorer()}, f"{__name__}:Scorer"),
        ({"train_data": ROWS}, "<2 rows>"),
        ({"train_data": datasets.Dataset.from_list(ROWS)}, "<2 rows>"),
        ({"train_data": (row for row in ROWS)}, "<generator>"),
        ({"kl_target": 6}, 6),
        ({"bf16": True}, True),
        ({"columns": {"prompt": "question"}}, {"prompt": "question"}),
        ({"micro_batch_size": None}, None),
    ],
)
def test_description_fits_into_json(given, described):
    config = PPOConfig(**ONLINE | given)
    (name,) = given
    assert json.loads(json.dumps(describe(config)))[name] == described
    assert describe(config).keys() == vars(config).keys()


def test_several_rewards_in_flags_and_files(tmp_path):
    fixed = ["--model", "m", "--output-dir", "o", "--train-data", "t"]

    def parsed(*flags):
        config = parse(RLOOConfig, [*fixed, *flags], "rloo")
        return config.reward, config.reward_weights, config.batch_size

    two = ["--reward", "a", "--batch-size", "8", "--reward=b"]
    assert parsed("--reward", "a") == ("a", None, 32)
    assert parsed(*two) == (["a", "b"], None, 8)
    assert parsed(*two, "--reward-weights", "1", "-0.5") == (["a", "b"], [1.0, -0.5], 8)
    file = tmp_path / "run.yaml"
    for text, found in (
        ("reward: a", "a"),
        ("reward: [a]", "a"),
        ("reward: [a, b]\nreward_weights: [1, 2]", ["a", "b"]),
    ):
        file.write_text(text)
        assert parsed("--config", str(file))[0] == found
    for flags, message in (
        (["--reward", "a", "b"], "unrecognized arguments: b"),
        (
            [*two, "--reward-weights", "1"],
            r"reward_weights: expected a finite number for each of 2 rewards, got \[1.0\]",
        ),
        ([*two, "--reward-weights", "1", "x"], "reward_weights: expected list of float, got 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            parsed(*flags)
    file.write_text("reward: 3")
    with pytest.raises(ValueError, match="run.yaml: reward: expected str or list of str, got 3"):
        parsed("--config", str(file))
    config = from_dict(RLOOConfig, {"model": "m", "output_dir": "o", "train_data": "t", "reward": ["a", "b"]}, "rloo")
    with pytest.raises(ValueError, match=r"reward_weights: expected a finite .* 2 rewards, got \[1, nan\]"):
        dataclasses.replace(config, reward_weights=[1, float("nan")])
    assert config.reward == ["a", "b"] and describe(config)["reward"] == ["a", "b"]


def test_the_home_directory_is_written_out(monkeypatch, tmp_path):
    """The shell leaves `--output-dir=~/out` as it is."""
    monkeypatch.setenv("HOME", "/home/me")
    given = {"model": "~/m", "output_dir": Path("~/out"), "train_data": "~", "reward": ["~/my.py:score", "a:b"]}
    config = PPOConfig(**given, chat_template="~approx {{ x }}")
    assert (
        config.model == "/home/me/m" and config.output_dir == Path("/home/me/out") and config.train_data == "/home/me"
    )
    assert config.reward == ["/home/me/my.py:score", "a:b"] and config.chat_template == "~approx {{ x }}"
    rows = [{"prompt": "~/a"}]
    assert SFTConfig(model="m", output_dir="o", train_data=rows).train_data is rows
    pipeline = PipelineConfig(model="~/m", output_dir="~/out", sft={"train_data": "~/sft.jsonl"})
    assert make_plan(dataclasses.replace(pipeline, methods=[], reward=None))["sft"].train_data == "/home/me/sft.jsonl"
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("steps: 7\n")
    assert check_file(PPOConfig, "~/run.yaml") == {"steps": 7}
