"""Cheaper optimizers: stepped in backward, without gradients, bit for bit the ordinary one; states of one byte."""

import json

import pytest
import torch

from rlhf_fast.config import ReMaxConfig, SFTConfig
from rlhf_fast.lab.variance import gradient_variance
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.stages import sft
from rlhf_fast.training import optimizers
from rlhf_fast.training.learner import Learner, take_step
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.tally import Tally
from tests.support.models import random_policy, random_sequences
from tests.support.stages import STAGES, distance, interrupted, numbers, stage_config, weights


@pytest.mark.parametrize("name", ["sft", "ppo", "dpo"])
def test_optimizer_in_backward_gives_the_same_bits_without_gradients(name, files, tiny_model, tmp_path):
    module, cls = STAGES[name]
    for label, inside in (("ordinary", False), ("inside", True)):
        options = {"max_grad_norm": 0.0, "optimizer_in_backward": inside, "warmup_steps": 2, "weight_decay": 0.1}
        module.train(stage_config(cls, files, tiny_model, tmp_path / label, **options))
    assert distance(weights(tmp_path / "ordinary"), weights(tmp_path / "inside")) == 0
    for before, after in zip(numbers(tmp_path / "ordinary"), numbers(tmp_path / "inside"), strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    runs = [json.loads((tmp_path / d / "run.json").read_text())["static_bytes"] for d in ("ordinary", "inside")]
    assert all(runs[0][role]["gradients"] > 0 and runs[1][role]["gradients"] == 0 for role in ("policy",))
    assert runs[0]["policy"]["optimizer"] == runs[1]["policy"]["optimizer"]


def test_tied_weights_are_stepped_once_in_a_backward_pass():
    sequences, results = random_sequences(), []
    for inside in (False, True):
        model = random_policy("gpt2").train()
        assert model.lm_head.weight is model.transformer.wte.weight
        options = {"max_grad_norm": 0.0, "learning_rate": 1e-2, "optimizer_in_backward": inside}
        learner = Learner(model, SFTConfig(model="m", output_dir="out", train_data="rows", **options), total_steps=3)
        for _ in range(3):
            Objectives(model).sft(sequences, sequences.response_ids, 7.0).loss.backward()
            take_step(Tally(), {"grad_norm": learner})
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)
    assert (results[0] - torch.cat([p.flatten() for p in random_policy("gpt2").parameters()])).abs().max() > 0.01


def test_optimizer_in_backward_says_that_the_weights_are_spoilt(tiny_model):
    model = load_policy(tiny_model)
    config = SFTConfig(
        model=tiny_model, output_dir="out", train_data="rows", max_grad_norm=0.0, optimizer_in_backward=True
    )
    learner = Learner(model, config, total_steps=3)
    (model.lm_head.weight.sum() * float("nan")).backward()
    with pytest.raises(RuntimeError, match="gradient norm is nan; the weights were spoilt$"):
        take_step(Tally(), {"grad_norm": learner})


def test_adamw_8bit(files, tiny_model, tmp_path, monkeypatch):
    options = {"epochs": 3, "save_steps": 10, "learning_rate": 5e-3}
    for kind in ("adamw", "adamw_8bit"):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / kind, optimizer=kind, **options))
    losses = [read_metrics(tmp_path / kind / "metrics.jsonl")[-1]["loss"] for kind in ("adamw", "adamw_8bit")]
    assert losses[1] == pytest.approx(losses[0], abs=0.05)
    runs = [json.loads((tmp_path / kind / "run.json").read_text()) for kind in ("adamw", "adamw_8bit")]
    large = sum(p.numel() for p in load_policy(tiny_model).parameters() if p.numel() >= 4096)
    small = runs[0]["parameters"]["policy"] - large
    states = runs[1]["static_bytes"]["policy"]["optimizer"]
    assert 2 * large + 8 * small <= states < 2.2 * large + 8 * small + 40_000  # + scales and the two code books
    cut = interrupted(tmp_path / "adamw_8bit", tmp_path / "cut")
    sft.train(stage_config(SFTConfig, files, tiny_model, cut, optimizer="adamw_8bit", resume=True, **options))
    assert distance(weights(tmp_path / "adamw_8bit"), weights(cut)) == 0

    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optimizer: expected bitsandbytes .* pip install 'rlhf-fast\[8bit\]'"):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "none", optimizer="adamw_8bit"))
    monkeypatch.undo()
    monkeypatch.setattr("bitsandbytes.optim.AdamW8bit.step", lambda self: 1 / 0)
    with pytest.raises(ValueError, match="optimizer: expected adamw_8bit to run on cpu, bitsandbytes says: division"):
        sft.train(stage_config(SFTConfig, files, tiny_model, tmp_path / "none", optimizer="adamw_8bit"))


def test_gradient_variance_refuses_to_train(files, tiny_model, tmp_path):
    config = stage_config(ReMaxConfig, files, tiny_model, tmp_path, optimizer_in_backward=True, max_grad_norm=0.0)
    with pytest.raises(ValueError, match="optimizer_in_backward: expected false"):
        gradient_variance(config, batches=2)
