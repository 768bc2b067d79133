"""bf16 weights: fp32 master weights, resume bit for bit, policy = reference, losses beside fp32, bytes of each role."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from rlhf_fast.config import DPOConfig, PPOConfig, ReMaxConfig, RLOOConfig, SFTConfig
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.stages import dpo, ppo, rloo, sft
from rlhf_fast.training import checkpoint
from rlhf_fast.training.learner import Learner, take_step
from rlhf_fast.training.metrics import read_metrics
from rlhf_fast.training.optimizers import MasterWeights, make_optimizer
from rlhf_fast.training.tally import Tally
from tests.support.stages import STAGES, distance, interrupted, stage_config, weights


@pytest.fixture(scope="module")
def half_model(tiny_model, tmp_path_factory):
    """The tiny model with bf16 numbers, as published checkpoints have them."""
    directory = tmp_path_factory.mktemp("half") / "llama"
    load_policy(tiny_model, dtype="bf16").save_pretrained(directory)
    load_tokenizer(tiny_model).save_pretrained(directory)
    return str(directory)


def sft_options(**options):
    return SFTConfig(model="m", output_dir="out", train_data="rows", **options)


def test_steps_are_those_of_fp32_copies():
    torch.manual_seed(0)
    half = [nn.Parameter(torch.randn(5, 7).bfloat16()), nn.Parameter(torch.randn(3).bfloat16())]
    half.append(nn.Parameter(torch.randn(2, 2)))  # fp32 beside bf16: its own copy
    full = [nn.Parameter(p.detach().float()) for p in half]
    config = sft_options(weight_decay=0.1, dtype="bf16")
    mine, theirs = (make_optimizer(config, p, 1e-3) for p in (half, full))
    assert isinstance(mine, MasterWeights) and not isinstance(theirs, MasterWeights)
    for step in range(4):
        for a, b in zip(half, full, strict=True):
            gradient = torch.randn_like(b).to(a.dtype)
            a.grad, b.grad = gradient, gradient.float()
        if step == 2:
            half[1].grad = full[1].grad = None
        mine.step()
        theirs.step()
        theirs.zero_grad()
    for a, master, b in zip(half, mine.masters, full, strict=True):
        assert torch.equal(master, b) and torch.equal(a, b.to(a.dtype))


def test_updates_below_the_rounding_of_bf16_add_up():
    weight = nn.Parameter(torch.ones(4, 4).bfloat16())
    optimizer = make_optimizer(sft_options(dtype="bf16"), [weight], 1e-4)
    for _ in range(100):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    # 100 steps of 1e-4, each of which rounds to nothing: the distance between bf16 numbers below 1 is 2^-8
    assert (weight.detach().float() - 0.99).abs().max() <= 2**-9
    assert (optimizer.masters[0].detach() - 0.99).abs().max() < 1e-5


def test_gradients_are_clipped_in_fp32(tiny_model):
    model = load_policy(tiny_model, dtype="bf16")
    learner = Learner(model, sft_options(dtype="bf16", max_grad_norm=0.5), total_steps=3)
    torch.manual_seed(0)
    gradients = [torch.randn_like(p) for p in learner.parameters]
    for parameter, gradient in zip(learner.parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    full = [nn.Parameter(p.detach().float()) for p in learner.parameters]
    for parameter, gradient in zip(full, gradients, strict=True):
        parameter.grad = gradient.float()
    norm = torch.nn.utils.clip_grad_norm_(full, 0.5)
    optimizer = make_optimizer(sft_options(), full, 1e-5)
    optimizer.step()
    assert take_step(Tally(), {"norm": learner})["norm"] == pytest.approx(norm.item(), rel=1e-6)
    for mine, theirs in zip(learner.optimizer.masters, full, strict=True):
        assert (mine - theirs).abs().max() < 1e-9


@pytest.mark.parametrize("name", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(name, files, tiny_model, tmp_path):
    module, cls = STAGES[name]
    config = stage_config(cls, files, tiny_model, tmp_path / "whole", save_steps=2, dtype="bf16")
    module.train(config)
    saved = weights(tmp_path / "whole")
    assert {w.dtype for w in saved.values()} == {torch.bfloat16}
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    module.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    assert distance(saved, weights(cut)) == 0
    assert distance(weights(checkpoint.latest(cut)), weights(cut)) > 0
    product = "reward" if name == "reward" else "policy"
    parameters = json.loads((cut / "run.json").read_text())
    static, count = parameters["static_bytes"][product], parameters["parameters"][product]
    assert static["gradients"] == 2 * count and static["optimizer"] == pytest.approx(12 * count, abs=100)


@pytest.mark.parametrize("options", [{"optimizer": "adamw_8bit"}, {"lora_rank": 2}, {"optimizer_in_backward": True}])
def test_resume_with_the_other_optimizers(options, files, tiny_model, tmp_path):
    options = {"save_steps": 2, "dtype": "bf16", **options}
    options |= {"max_grad_norm": 0.0} if "optimizer_in_backward" in options else {}
    config = stage_config(PPOConfig, files, tiny_model, tmp_path / "whole", **options)
    ppo.train(config)
    cut = interrupted(tmp_path / "whole", tmp_path / "cut")
    ppo.train(dataclasses.replace(config, output_dir=str(cut), resume=True))
    assert distance(weights(tmp_path / "whole"), weights(cut)) == 0
    if "lora_rank" in options:
        assert {w.dtype for w in weights(cut).values()} == {torch.float32}  # the adapters


@pytest.mark.parametrize("options", [{"dtype": "bf16"}, {"bf16": True}, {"dtype": "bf16", "lora_rank": 2}])
def test_policy_equals_reference_before_the_first_step(options, files, tiny_model, tmp_path):
    dpo.train(stage_config(DPOConfig, files, tiny_model, tmp_path, **options))
    first = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_frozen_models_take_two_bytes_a_weight_and_can_be_kept_in_four(files, half_model, tmp_path):
    module, cls = STAGES["reward"]
    module.train(stage_config(cls, files, half_model, tmp_path / "reward", dtype="bf16"))
    held = {}
    for label, options in (
        ("fp32", {}),
        ("bf16", {"dtype": "bf16"}),
        ("autocast", {"bf16": True}),
        ("kept", {"bf16": True, "frozen_dtype": "fp32"}),
        ("wanted", {"frozen_dtype": "bf16"}),
    ):
        options |= {"reward": str(tmp_path / "reward"), "steps": 2}
        ppo.train(stage_config(PPOConfig, files, half_model, tmp_path / label, **options))
        run = json.loads((tmp_path / label / "run.json").read_text())
        count = {"reference": run["parameters"]["policy"], "reward": run["parameters"]["value"], **run["parameters"]}
        held[label] = {role: sum(b.values()) / count[role] for role, b in run["static_bytes"].items()}
    trained = {"policy": 16, "value": 16}
    for label, frozen in (("fp32", 4), ("bf16", 2), ("autocast", 2), ("kept", 4), ("wanted", 2)):
        expected = trained | {"reward": frozen, "reference": frozen}
        assert held[label] == pytest.approx(expected, rel=0.04), label  # a value head, and norms in fp32
    assert sum(held["bf16"].values()) == pytest.approx(36, rel=0.02)


def test_losses_stay_beside_those_of_fp32(files, half_model, tmp_path):
    options = {"epochs": 8, "learning_rate": 5e-4, "seed": 1}
    losses = {}
    for label, more in (("fp32", {}), ("bf16", {"dtype": "bf16"}), ("autocast", {"bf16": True})):
        sft.train(stage_config(SFTConfig, files, half_model, tmp_path / label, **options, **more))
        losses[label] = torch.tensor([row["loss"] for row in read_metrics(tmp_path / label / "metrics.jsonl")])
    assert losses["fp32"][0] - losses["fp32"][-1] > 0.3  # it learns
    for label in ("bf16", "autocast"):
        assert (losses[label] - losses["fp32"]).abs().max() < 0.01


def test_rollouts_of_bf16_weights_agree_with_training(files, tiny_model, tmp_path):
    rloo.train(stage_config(RLOOConfig, files, tiny_model, tmp_path, dtype="bf16", frozen_dtype="fp32"))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert all(1e-4 < row["val/logprob_drift"] < 0.2 for row in rows)
    assert all(math.isfinite(row["grad_norm"]) and row["grad_norm"] > 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bf16": True, "dtype": "bf16"}, "bf16: expected autocast over fp32 weights, got it with dtype=bf16"),
        ({"dtype": "fp16"}, "dtype: expected one of fp32, bf16, got 'fp16'"),
        (
            {"share_base": True, "lora_rank": 2, "dtype": "bf16", "frozen_dtype": "fp32"},
            "frozen_dtype: expected bf16, the dtype of the shared base, got fp32",
        ),
    ],
)
def test_contradictions_are_refused(options, message, files, tiny_model, tmp_path):
    with pytest.raises(ValueError, match=message):
        stage_config(ReMaxConfig, files, tiny_model, tmp_path, **options)
