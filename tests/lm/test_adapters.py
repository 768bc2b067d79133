"""Adapters on every architecture: exact against the base alone and against peft's own loading, shared or not."""

import json
import shutil
from importlib import util

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rlhf_fast.config import SFTConfig
from rlhf_fast.lm import adapters
from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.loading import load_policy, load_scorer, set_score_offset, value_head_on
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import response_logits, sequence_scores, token_values
from rlhf_fast.training import checkpoint
from rlhf_fast.training.memory import static_bytes
from tests.support.models import ARCHITECTURES, random_policy, random_sequences

ADAPTER = LoRA(4, 8.0, seed=0)


def spread(model):
    """As after training: a new adapter's second factor is 0, and so is its effect."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=ARCHITECTURES)
def base(request, tmp_path):
    random_policy(request.param).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@torch.no_grad()
def test_a_policy_with_an_adapter(base, tmp_path):
    sequences = random_sequences()
    alone = load_policy(base, trainable=False)
    plain = response_logits(alone, sequences)
    policy = load_policy(base, lora=ADAPTER)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if ".lora_" in name} != set()
    layers = [m for m in alone.base_model.modules() if isinstance(m, nn.Linear | Conv1D)]
    assert len(trained) == 2 * len(layers)
    assert torch.equal(response_logits(policy, sequences), plain)

    reference = load_policy(base, trainable=False, shared=policy)
    spread(policy)
    adapted = response_logits(policy, sequences)
    assert (adapted - plain).abs().max() > 0.1
    assert torch.equal(response_logits(reference, sequences), plain)

    checkpoint.save(tmp_path / "policy", models={"": policy})
    assert not list((tmp_path / "policy").glob("model*"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "policy")).base_model.model
    assert torch.equal(response_logits(theirs, sequences), adapted)
    again = load_policy(tmp_path / "policy", lora=ADAPTER)
    assert torch.equal(response_logits(again, sequences), adapted)
    as_it_was = load_policy(tmp_path / "policy", trainable=False, shared=again)
    spread(again).zero_grad()
    for parameter in again.parameters():
        parameter.data = parameter.data * (1.5 if parameter.requires_grad else 1)
    assert torch.equal(response_logits(as_it_was, sequences), adapted)  # its adapter is its own
    merged = load_policy(tmp_path / "policy")
    assert not adapters.has_adapter(merged) and all(p.requires_grad for p in merged.parameters())
    torch.testing.assert_close(response_logits(merged, sequences), adapted, rtol=1e-4, atol=2e-5)


@torch.no_grad()
def test_a_scorer_with_an_adapter(base, tmp_path):
    sequences = random_sequences()
    scorer = spread(load_scorer(base, lora=ADAPTER))
    unshifted = sequence_scores(scorer, sequences)
    set_score_offset(scorer, 1.5)
    scores = sequence_scores(scorer, sequences)
    checkpoint.save(tmp_path / "reward", models={"": scorer})
    theirs = peft.AutoPeftModelForSequenceClassification.from_pretrained(str(tmp_path / "reward"), num_labels=1)
    assert torch.equal(sequence_scores(theirs.base_model.model, sequences), unshifted)
    policy = load_policy(base, lora=ADAPTER)
    for options in (
        {"lora": ADAPTER},
        {"lora": ADAPTER, "shared": policy},
        {"trainable": False, "shared": policy},
    ):
        assert torch.equal(sequence_scores(load_scorer(tmp_path / "reward", **options), sequences), scores), options
    merged = load_scorer(tmp_path / "reward", trainable=False)
    torch.testing.assert_close(sequence_scores(merged, sequences), scores, rtol=1e-4, atol=2e-5)

    # A policy's adapter under a new score head: the value model of a policy that was fine-tuned with LoRA.
    checkpoint.save(tmp_path / "policy", models={"": spread(policy)})
    value = load_scorer(tmp_path / "policy", head="zero", lora=ADAPTER, shared=policy)
    assert token_values(value, sequences).abs().max() == 0
    merged_trunk = load_policy(tmp_path / "policy").base_model
    inputs = {"input_ids": sequences.input_ids(), "attention_mask": sequences.attention_mask().long()}
    torch.testing.assert_close(
        value.base_model(**inputs).last_hidden_state, merged_trunk(**inputs).last_hidden_state, rtol=1e-4, atol=2e-5
    )


@torch.no_grad()
def test_a_value_head_on_the_policys_trunk(base, tmp_path):
    sequences = random_sequences()
    for name, policy in {"full": load_policy(base), "lora": spread(load_policy(base, lora=ADAPTER))}.items():
        value = value_head_on(policy, None)
        assert value.base_model is policy.base_model
        assert token_values(value, sequences).abs().max() == 0
        (head,) = [p for p in value.score.parameters() if p.requires_grad]
        head.normal_()
        values = token_values(value, sequences)
        checkpoint.save(tmp_path / name, models={"": policy, "value": value})
        alone = load_scorer(tmp_path / name / "value")
        torch.testing.assert_close(token_values(alone, sequences), values, rtol=1e-4, atol=1e-4)
        assert torch.equal(token_values(value_head_on(policy, tmp_path / name / "value"), sequences), values)


def test_a_new_adapter_depends_on_its_seed_alone(tmp_path):
    random_policy("llama").save_pretrained(tmp_path / "base")
    first, again, other = (load_policy(tmp_path / "base", lora=ADAPTER._replace(seed=seed)) for seed in (5, 5, 6))
    state = torch.get_rng_state()
    shared = load_policy(tmp_path / "base", lora=ADAPTER._replace(seed=5), shared=first)
    assert torch.equal(torch.get_rng_state(), state)
    firsts, agains, others, shareds = (
        [p for name, p in model.named_parameters() if "lora_A" in name] for model in (first, again, other, shared)
    )
    assert all(map(torch.equal, firsts, agains)) and all(map(torch.equal, firsts, shareds))
    assert not any(map(torch.equal, firsts, others))


def test_one_base_holds_four_models(tmp_path):
    random_policy("llama").save_pretrained(tmp_path / "base")
    policy = load_policy(tmp_path / "base", lora=ADAPTER)
    models = {
        "policy": policy,
        "value": load_scorer(tmp_path / "base", lora=ADAPTER, shared=policy),
        "reference": load_policy(tmp_path / "base", trainable=False, shared=policy),
    }
    held = {role: parts["weights"] for role, parts in static_bytes(models).items()}
    base = static_bytes({"": load_policy(tmp_path / "base")})[""]["weights"]
    adapter = 4 * sum(p.numel() for p in policy.parameters() if p.requires_grad)
    head = 2 * 4 * 48  # the one of peft's wrapper that is trained, and the one it was copied from
    assert held == {"policy": base + adapter, "value": adapter + head, "reference": 0}


def test_losses_take_the_frozen_heads_path():
    """4NHV: the logits, and the hidden states' gradient; the gradient of a trained head would be 2NHV more."""
    sequences, vocabulary = random_sequences(), 37
    matmuls = {}
    for name in ("full", "lora"):
        policy = random_policy("llama").train()
        if name == "lora":
            policy.requires_grad_(False)
            adapters.put_on(policy, "no directory", ADAPTER, trainable=True)
        objectives = Objectives(policy)
        assert objectives.head.layer.weight.requires_grad == (name == "full")
        advantages = torch.ones(sequences.response_ids.shape)
        with torch.profiler.profile(record_shapes=True) as profile:
            objectives.ppo(sequences, -4 * advantages, advantages).loss.backward()
        matmuls[name] = sum(
            event.name in ("aten::mm", "aten::addmm", "aten::addmm_")
            and any(vocabulary in shape for shape in event.input_shapes)
            for event in profile.events()
        )
    assert matmuls == {"full": 3, "lora": 2}


def test_errors(tiny_model, tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "adapter", models={"": load_policy(tiny_model, lora=ADAPTER)})
    for lora, message in ((LoRA(8, 8.0, 0), "lora_rank: expected 4, .* got 8"), (LoRA(4, 1.0, 0), "lora_alpha: exp")):
        with pytest.raises(ValueError, match=message):
            load_policy(tmp_path / "adapter", lora=lora)
    random_policy("llama").save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="share_base: expected adapters on the policy's base .*, got base .*other"):
        load_scorer(tmp_path / "other", shared=load_policy(tiny_model, lora=ADAPTER))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == tiny_model
    (tmp_path / "adapter" / "checkpoint.json").unlink()  # with the checksums of its files, because they are edited
    shutil.copytree(tmp_path / "adapter", tmp_path / "moved")
    settings["base_model_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "moved" / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="expected the base of the adapter in .*moved at .*gone, found no directory"):
        load_policy(tmp_path / "moved")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    checkpoint.save(tmp_path / "deep", models={"": load_policy(_deeper(tmp_path), lora=ADAPTER)})
    shutil.copy(tmp_path / "deep" / "adapter_model.safetensors", weights)
    with pytest.raises(ValueError, match="expected an adapter of .*, found weights without a place: .*layers.2"):
        load_policy(tmp_path / "adapter")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None if name == "peft" else util.find_spec(name))
    config = SFTConfig(model=tiny_model, output_dir="out", train_data="rows.jsonl", lora_rank=4)
    with pytest.raises(ValueError, match=r"lora_rank: expected peft .* pip install 'rlhf-fast\[lora\]'"):
        adapters.lora_of(config)
    with pytest.raises(ValueError, match="model: expected peft"):
        load_policy(tmp_path / "adapter")


def _deeper(tmp_path) -> str:
    from transformers import AutoModelForCausalLM

    config = random_policy("llama", vocab_size=124).config
    config.num_hidden_layers = 3
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "deeper")
    return str(tmp_path / "deeper")
