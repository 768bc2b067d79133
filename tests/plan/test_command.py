"""`rlhf-fast plan` and the stages' `--dry-run`, from the command line to the file."""

import json
from pathlib import Path

import pytest
import torch

from rlhf_fast import cli
from rlhf_fast.config import DPOConfig, PPOConfig
from rlhf_fast.methods import STAGES
from rlhf_fast.plan.command import largest_batch, plan_of
from rlhf_fast.plan.config import PlanConfig
from rlhf_fast.plan.gpus import needed, parse_memory
from rlhf_fast.plan.phases import Planner

METHODS = {
    "sft": (["policy"], ["policy_update", "optimizer"]),
    "reward": (["reward"], ["policy_update", "optimizer"]),
    "dpo": (["policy", "reference"], ["reference", "policy_update", "optimizer"]),
    "ppo": (
        ["policy", "value", "reward", "reference"],
        ["rollout", "scoring", "reference", "value", "policy_update", "value_update", "optimizer"],
    ),
}
METHODS |= dict.fromkeys(
    ("remax", "reinforce", "rloo", "grpo"),
    (["policy", "reward", "reference"], ["rollout", "scoring", "reference", "policy_update", "optimizer"]),
)


@pytest.mark.parametrize("method", METHODS)
def test_the_file(method, shapes, tmp_path, capsys):
    out = tmp_path / "plan.json"
    flags = f"--model {shapes['small']} --method {method} --batch-size 8 --prompt-length 16 --response-length 16"
    assert cli.main(["plan", *flags.split(), "--out", str(out), "--memory", "20MiB"]) == 0
    plan = json.loads(out.read_text())
    roles, phases = METHODS[method]
    assert plan["method"] == method
    assert list(plan["parameters"]) == list(plan["static_bytes"]) == roles
    assert list(plan["phases"]) == phases
    for static in plan["static_bytes"].values():
        assert list(static) == ["weights", "gradients", "optimizer"]
    for phase in plan["phases"].values():
        assert phase["peak_bytes"] == sum(phase["parts"].values())
    assert plan["peak_bytes"] == max(phase["peak_bytes"] for phase in plan["phases"].values())
    assert plan["fits"]["T4 16GB"] is True and plan["fits"]["your 20MiB"] is False
    assert plan["largest_batch"]["your 20MiB"] == 0 < plan["largest_batch"]["T4 16GB"]
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    text = capsys.readouterr().out
    assert text.endswith(f"plan: wrote {out}\n") and "T4 16GB" in text and "Static memory" not in text


def test_explained_sums_are_the_peaks(shapes, capsys):
    flags = f"--model {shapes['small']} --method ppo --prompt-length 16 --response-length 16 --explain --device cpu"
    assert cli.main(["plan", *flags.split()]) == 0
    text = capsys.readouterr().out
    assert "plan: wrote" not in text
    text = " ".join(text[text.index("Phases: the sum") :].split())
    phases = Planner(PlanConfig(model=shapes["small"], method="ppo", prompt_length=16, response_length=16)).phases(
        "cpu"
    )
    for phase in phases.values():
        terms = " + ".join(f"{size:,} ({part})" for part, size in phase.parts.items())
        assert f"{terms} = {phase.peak_bytes:,}" in text


@pytest.mark.parametrize("method", STAGES)
def test_dry_run_of_every_stage_loads_nothing(method, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("safetensors.safe_open", None)
    directory = tmp_path / "without_weights"
    directory.mkdir()
    (directory / "config.json").write_text((Path(tiny_model) / "config.json").read_text())
    flags = [
        "--model",
        str(directory),
        "--output-dir",
        str(tmp_path / "out"),
        "--train-data",
        "none.jsonl",
        "--dry-run",
    ]
    flags += ["--reward", "package.module:name"] if STAGES[method].needs_reward else []
    flags += ["--eval-rows", "held_out.jsonl"] if method == "kto" else []  # not the plan's number of prompts
    assert cli.main([method, *flags]) == 0
    assert f"{method} of {directory}" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["sft", "reward"])
def test_only_methods_sample_in_an_evaluation(method):
    with pytest.raises(ValueError, match=f"^eval_rows: expected 0 for {method}, which samples no prompts, got 4$"):
        PlanConfig(model="m", method=method, eval_rows=4)


def test_dry_run_is_for_stages(capsys):
    assert cli.main(["demo", "--dry-run"]) == 2
    assert "unknown flag '--dry-run'" in capsys.readouterr().err


def test_a_stages_config_as_a_plan():
    given = {"model": "m", "output_dir": "o", "train_data": "t", "batch_size": 12, "micro_batch_size": 4}
    online = {"max_prompt_length": 30, "max_response_length": 20, "bf16": True}
    plan = plan_of(
        "ppo", PPOConfig(**given, **online, reward="f.py:g", value_model="v", minibatches=3, top_k=9, top_p=0.5)
    )
    expected = {"batch_size": 12, "micro_batch_size": 4, "prompt_length": 30, "response_length": 20, "bf16": True}
    expected |= {"critic": "v", "reward": "none", "minibatches": 3, "top_k": 9, "top_p": 0.5}
    assert plan == PlanConfig(model="m", method="ppo", **expected)
    plan = plan_of("dpo", DPOConfig(**given, max_length=50, max_prompt_length=40, reference="r"))
    expected = {"batch_size": 12, "micro_batch_size": 4, "prompt_length": 40, "response_length": 10, "reference": "r"}
    assert plan == PlanConfig(model="m", method="dpo", **expected)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}, {"method": "rloo", "group_size": 4}])
def test_the_largest_batch_fits_and_the_next_does_not(options, shapes):
    plan = PlanConfig(
        **{"model": shapes["grouped"], "method": "ppo", "prompt_length": 16, "response_length": 16} | options
    )
    planner, memory = Planner(plan), 2 << 30
    unit = 4 if plan.method == "rloo" else 1
    batch = largest_batch(planner, memory)
    assert batch > plan.batch_size and batch % unit == 0
    for rows, fits in ((batch, True), (batch + unit, False)):
        phases = planner.phases("cuda", batch=rows).values()
        assert (needed(max(phase.peak_bytes for phase in phases)) <= memory) == fits


def test_memory_and_models_as_text(tmp_path, capsys):
    for text, size in {"1000": 1000, "2KiB": 2048, "1.5 GB": 1_500_000_000, "24GiB": 24 << 30, "1T": 10**12}.items():
        assert parse_memory(text) == size
    for text in ("", "GiB", "0", "-1GB", "3 parsecs"):
        with pytest.raises(ValueError, match="memory: expected bytes, or a number with a unit"):
            parse_memory(text)
    (tmp_path / "empty.json").write_text("[]")
    for path, message in {
        str(tmp_path / "empty.json"): "model: expected a config with model_type, found none in",
        str(tmp_path / "absent.json"): "model: expected a model's config.json, got",
        str(tmp_path / "absent"): "model: expected a checkpoint directory or a hub name",
    }.items():
        assert cli.main(["plan", "--model", path, "--method", "sft"]) == 1
        assert f"rlhf-fast: {message}" in capsys.readouterr().err


def test_nothing_is_allocated(shapes, tmp_path):
    """Seven billion weights on a machine that could not hold a tenth of them."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    Planner(PlanConfig(model=shapes["llama-2-7b"], method="sft", dtype="bf16")).phases("cuda")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB
    assert torch.get_default_dtype() == torch.float32
