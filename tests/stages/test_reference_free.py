"""DPO without a reference, and mixtures of its losses: the loss of a stage, what it loads, and what the plan knows."""

import json

import pytest
import torch

from rlhf_fast import dpo_loss
from rlhf_fast.config import DPOConfig, OnlineDPOConfig
from rlhf_fast.config.arguments import parse
from rlhf_fast.data.stage_rows import encode_stage
from rlhf_fast.lm.loading import load_policy
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.tokenizers import load_tokenizer
from rlhf_fast.plan.command import plan_of
from rlhf_fast.plan.roles import roles_of
from rlhf_fast.stages import dpo
from rlhf_fast.training import resume
from rlhf_fast.training.metrics import read_metrics
from tests.support.stages import REWARD, stage_config

MINE = {"model": "m", "output_dir": "o", "train_data": "t"}


def first_loss(config, files, tiny_model, **options):
    """The loss of one batch of all pairs, by the operation on log-probs of the model as it starts."""
    tokenizer, model = load_tokenizer(tiny_model), load_policy(tiny_model)
    examples = encode_stage("dpo", files["pairs"], tokenizer, config).examples
    pairs = dpo.pair_sequences(examples, 0, torch.device("cpu"))
    chosen, rejected = Objectives(model).logprobs(pairs).logprobs.sum(1).detach().chunk(2)
    lengths = pairs.response_mask.sum(1).chunk(2)
    named = dict(chosen_lengths=lengths[0], rejected_lengths=lengths[1])
    return dpo_loss(chosen, rejected, chosen, rejected, **named, **options).losses.mean().item()


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "simpo", "simpo_gamma": 0.3, "beta": 2.0},
        {"loss_type": "orpo", "beta": 0.2},
        {"loss_type": ["cpo", "simpo"], "cpo_alpha": 0.5, "loss_weights": [1.0, 0.5]},
    ],
)
def test_no_reference_is_loaded(options, files, tiny_model, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(resume, "load_policy", lambda *a, **k: loaded.append(a) or load_policy(*a, **k))
    options |= {"batch_size": 96, "eval_pairs": files["pairs"]}
    config = stage_config(DPOConfig, files, tiny_model, tmp_path, micro_batch_size=32, **options)
    dpo.train(config)
    assert len(loaded) == 1
    assert json.loads((tmp_path / "run.json").read_text())["static_bytes"].keys() == {"policy"}
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    own = {name: options[name] for name in options if name not in ("batch_size", "eval_pairs")}
    assert row["loss"] == pytest.approx(first_loss(config, files, tiny_model, **({"beta": 0.1} | own)), rel=1e-5)
    assert row["eval/loss"] < row["loss"]


def test_a_mixture_with_a_reference(files, tiny_model, tmp_path):
    options = {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    config = stage_config(DPOConfig, files, tiny_model, tmp_path, batch_size=96, **options)
    dpo.train(config)
    row = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(first_loss(config, files, tiny_model, **options), rel=1e-5)


def test_an_evaluation_has_a_reference(files, tiny_model, tmp_path):
    options = {"loss_type": "simpo", "eval_data": files["prompts"], "eval_reward": REWARD, "batch_size": 96}
    dpo.train(stage_config(DPOConfig, files, tiny_model, tmp_path, **options))
    assert "reference" in json.loads((tmp_path / "run.json").read_text())["static_bytes"]
    before, *_, after = read_metrics(tmp_path / "metrics.jsonl")
    assert before["eval/kl"] == pytest.approx(0, abs=1e-6) and after["eval/kl"] > 0


def test_the_plan_knows(files, tiny_model, tmp_path):
    for loss, roles in (("orpo", {"policy"}), ("sigmoid", {"policy", "reference"})):
        plan = plan_of("dpo", stage_config(DPOConfig, files, tiny_model, tmp_path, loss_type=loss))
        assert plan.reference_free == (loss == "orpo") and roles_of(plan).keys() == roles
    evaluated = {"loss_type": "orpo", "eval_data": files["prompts"], "eval_reward": REWARD}
    assert not plan_of("dpo", stage_config(DPOConfig, files, tiny_model, tmp_path, **evaluated)).reference_free


def test_flags():
    flags = ["--model=m", "--output-dir=o", "--train-data=t", "--loss-type=sigmoid"]
    assert parse(DPOConfig, flags, "x").loss_type == "sigmoid"
    mixture = parse(DPOConfig, [*flags, "--loss-type", "sft", "--loss-weights", "1", "0.5"], "x")
    assert (mixture.loss_type, mixture.loss_weights) == (["sigmoid", "sft"], [1.0, 0.5])
    with pytest.raises(ValueError, match="loss_type|loss-type"):
        parse(DPOConfig, [*flags, "--loss-type=dp"], "x")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"loss_type": "aot"}, "loss_type: expected one of sigmoid, .* got 'aot'"),
        ({"loss_type": ["sft", "aot"]}, "loss_type: expected one of sigmoid, .* got 'aot'"),
        ({"loss_type": ["sft", "sft"]}, "loss_type: expected one name, or several different names, got "),
        ({"loss_type": []}, "loss_type: expected one name, or several different names, got "),
        ({"loss_weights": [1.0, 2.0]}, "loss_weights: expected a finite number for each of 1 losses, got"),
        (
            {"loss_type": "orpo", "label_smoothing": 0.1},
            "label_smoothing: expected 0, as it has none, for loss_type orpo",
        ),
        ({"simpo_gamma": 1.0}, "simpo_gamma: expected loss_type simpo beside it, got loss_type sigmoid"),
        ({"loss_type": "simpo", "cpo_alpha": 2.0}, "cpo_alpha: expected loss_type cpo beside it, got loss_type simpo"),
        ({"loss_type": "cpo", "reference_logprobs": "f"}, "reference_logprobs: expected none, because loss_type cpo"),
        ({"loss_type": "cpo", "reference": "r"}, "reference: expected none, because loss_type cpo has no reference"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        DPOConfig(**MINE, **options)
    if not options.keys() & {"reference", "reference_logprobs"}:
        with pytest.raises(ValueError, match=message):
            OnlineDPOConfig(**MINE, reward="f.py:r", **options)
