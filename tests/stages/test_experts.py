"""Stages on a mixture of experts: its load-balancing loss, and adapters on its experts."""

import math
from pathlib import Path

import pytest

from rlhf_fast.config import DPOConfig, RewardConfig, RLOOConfig, SFTConfig
from rlhf_fast.lm import fast_paths
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import dpo, reward, rloo, sft
from rlhf_fast.stages.init import init_model
from rlhf_fast.training.metrics import read_metrics
from tests.support.models import model_config
from tests.support.stages import stage_config

EXPERTS = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def experts(tmp_path_factory, tiny_model):
    """A function: settings -> the folder of a small Mixtral."""

    def make(**settings):
        tokenizer = load_tokenizer(tiny_model)
        config = model_config("llama", len(tokenizer)) | EXPERTS | settings
        del config["vocab_size"]
        directory = tmp_path_factory.mktemp("experts") / "mixtral"
        init_model(config, tokenizer, directory, seed=0)
        return str(directory)

    return make


def run(module, cls, files, model, path, **options):
    module.train(stage_config(cls, files, model, path, **options))
    return read_metrics(path / "metrics.jsonl")


def test_the_balance_has_a_metric_and_a_gradient(experts, files, tmp_path):
    options = {"learning_rate": 1e-12, "epochs": 1}
    asked = {"output_router_logits": True, "router_aux_loss_coef": 3.0}
    for module, cls, kind in ((sft, SFTConfig, "sft"), (dpo, DPOConfig, "dpo")):
        one, other = (
            run(module, cls, files, experts(**settings), tmp_path / f"{kind}{len(settings)}", **options)[0]
            for settings in (asked, {})
        )
        assert 1.5 < one["aux_loss"] < 4 and "aux_loss" not in other
        assert one["loss"] == pytest.approx(other["loss"] + 3 * one["aux_loss"], rel=1e-5)
        assert one["grad_norm"] != pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.parametrize("name", ["reward", "rloo"])
def test_stages_that_leave_the_balance_out_say_so(name, experts, files, tmp_path, monkeypatch):
    monkeypatch.setattr(fast_paths, "_said", set())
    module, cls = {"reward": (reward, RewardConfig), "rloo": (rloo, RLOOConfig)}[name]
    options = {"steps": 1, "group_size": 2} if name == "rloo" else {"epochs": 1, "batch_size": 64}
    with pytest.warns(UserWarning, match="output_router_logits is not used for Mixtral.*the loss is left out"):
        (row, *_) = run(module, cls, files, experts(output_router_logits=True), tmp_path, **options)
    assert "aux_loss" not in row


def test_adapters_on_experts_in_dpo(experts, files, tmp_path):
    """The reference is the policy without its adapter, then the adapter that training goes on from."""
    few = tmp_path / "few.jsonl"
    few.write_text("".join(Path(files["pairs"]).read_text().splitlines(keepends=True)[:8]))
    options = {"lora_rank": 4, "epochs": 3, "learning_rate": 1e-2, "batch_size": 8, "train_data": str(few)}
    model = experts()
    first = run(dpo, DPOConfig, files, model, tmp_path / "first", **options)
    again = run(dpo, DPOConfig, files, str(tmp_path / "first"), tmp_path / "again", **options)
    assert first[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first[-1]["loss"] < 0.69
    assert again[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
