"""The table of methods says of each what its config and its stage say; a new row reaches everything that reads it."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_fast.config import OnlineConfig, PipelineConfig, StageConfig
from rlhf_fast.data.rows import KINDS
from rlhf_fast.lab.demo import MEASURED
from rlhf_fast.lab.study.methods import STUDIED
from rlhf_fast.methods import FIRST_STAGES, METHODS, STAGES, load, section

FIRST = ["model", "output_dir", "methods", "seed", "title", "resume", "trust_remote_code"]
FIRST += ["common", "sft", "pairs", "reward"]


@pytest.mark.parametrize("name", STAGES)
def test_a_row_says_what_the_config_says(name):
    row = STAGES[name]
    config = load(row.config)
    fields = {field.name for field in dataclasses.fields(config)}
    assert issubclass(config, StageConfig) and callable(load(row.train))
    assert row.rows in KINDS
    assert row.online == issubclass(config, OnlineConfig)
    assert row.needs_reward == ("reward" in fields)
    assert ("value" in row.roles) == ("value_model" in fields)
    assert ("reference" in row.roles) == ("reference" in fields)
    assert (row.samples == "group_size") == ("group_size" in fields)
    assert row.minibatches == ("minibatches" in fields)
    assert row.sequences == (2 if row.rows == "preference" else 1)


def test_samples_per_prompt():
    assert [STAGES[name].samples_of(4) for name in ("sft", "dpo", "ppo", "remax", "rloo", "grpo")] == [1, 1, 1, 1, 4, 4]
    assert STAGES["ppo"]._replace(samples=2).samples_of(4) == 2


def test_methods_are_told_apart():
    for values in zip(*((m.title, m.color, m.marker) for m in METHODS.values()), strict=True):
        assert len(set(values)) == len(METHODS) and all(values)
    assert not FIRST_STAGES.keys() & METHODS.keys() and list(STAGES) == [*FIRST_STAGES, *METHODS]


def test_the_pipeline_has_a_section_per_method():
    assert [field.name for field in dataclasses.fields(PipelineConfig)] == [*FIRST, *map(section, METHODS)]
    one, two = (PipelineConfig(model="m", output_dir="o") for _ in range(2))
    one.dpo["beta"] = 0.3
    assert two.dpo == {}  # two configs share no section


def test_the_names_that_other_modules_choose_from_the_table():
    assert {*STUDIED, *MEASURED, *PipelineConfig(model="m", output_dir="o").methods} <= METHODS.keys()


NEW = """
import contextlib, io, json, sys
from pathlib import Path
from rlhf_fast.methods import METHODS, STAGES
color, marker, out, model = sys.argv[1:]
offline = METHODS["dpo"]._replace(title="Toy DPO", help="a throw-away method", color=color, marker=marker)
online = METHODS["reinforce"]._replace(title="Toy pairs", help="another", color="#010203", marker="8", samples=2)
for name, row in {"toy-dpo": offline, "toy-pairs": online}.items():
    METHODS[name] = STAGES[name] = row

from rlhf_fast import cli
from rlhf_fast.config import PipelineConfig
from rlhf_fast.lab.compare.cells import cells_of
from rlhf_fast.lab.compare.config import CompareConfig
from rlhf_fast.lab.compare.plots import reward
from rlhf_fast.lab.compare.start import Start
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.phases import Planner
from rlhf_fast.report import pipeline

def said(*argv):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert cli.main([*argv]) == 0
    return text.getvalue()

sections = {"sft": {"train_data": "s"}, "reward": {"train_data": "pairs"}, "toy_dpo": {"beta": 0.5}}
common = {"train_data": "prompts", "eval_data": "e", "eval_reward": "f.py:g"}
config = PipelineConfig(model="m", output_dir=out, methods=["toy-pairs", "toy-dpo"], common=common, **sections)
plan = pipeline.make_plan(config)
start = Start("policy", "reward", None, None, "prompts", f"{out}/pairs.jsonl", {})
Path(start.pairs).write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\\n' * 4)
cells = cells_of(CompareConfig(output_dir=out, methods=["toy-dpo", "toy-pairs"], steps=2, batch_size=4), start)
point = {"seconds": 1.0, "prompts": 2, "reward": 0.5, "reward_se": 0.1}
figure = reward([{"name": name, "reward": {"curve": [point]}} for name in ("Toy DPO", "Toy pairs", "PPO")])
lines = [line for line in figure.axes[0].lines if not line.get_label().startswith("_")]
phases = Planner(PlanConfig(model=model, method="toy-pairs", batch_size=4, prompt_length=4, response_length=4)).phases
print(json.dumps({
    "overview": said(),
    "dry run": said("toy-dpo", "--model", model, "--output-dir", out, "--train-data", "t", "--dry-run"),
    "beta": plan["toy-dpo"].beta,
    "data": [plan[name].train_data for name in config.methods],
    "directory": plan["toy-dpo"].output_dir,
    "cells": [[cell.name, cell.key, cell.options["batch_size"]] for cell in cells],
    "styles": {line.get_label(): [line.get_color(), line.get_marker()] for line in lines},
    "phases": list(phases("cpu")),
    "rollout": phases("cpu")["rollout"].how,
}))
"""


def test_a_new_row_reaches_everything(tmp_path):
    """Two throw-away methods, registered before anything else is imported, as a row in the table's file would be."""
    shape = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = tmp_path / "config.json"
    model.write_text(json.dumps(shape | {"num_attention_heads": 2, "vocab_size": 50}))
    command = [sys.executable, "-c", NEW, "#123456", "p", str(tmp_path), str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert "  toy-dpo           a throw-away method\n  toy-pairs         another\n" in seen["overview"]
    assert f"toy-dpo of {model}" in " ".join(seen["dry run"].split())
    assert seen["beta"] == 0.5 and seen["data"] == ["prompts", "pairs"]  # prompts online, the reward model's rows else
    assert Path(seen["directory"]) == tmp_path / "toy-dpo"
    assert seen["cells"] == [["Toy DPO", "toy-dpo-seed0", 2], ["Toy pairs", "toy-pairs-seed0", 4]]
    expected = {"Toy DPO": ["#123456", "p"], "Toy pairs": ["#010203", "8"], "PPO": ["#0072B2", "o"]}
    assert seen["styles"] == expected
    assert seen["phases"] == ["rollout", "scoring", "reference", "policy_update", "optimizer"]
    assert seen["rollout"].startswith("4 rows:") and "prefill of 2 prompts" in seen["rollout"]
