"""Trials of half-precision models: a deep model keeps its fast paths in bf16, and a wrong path is still found out."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rlhf_fast.lm import packing, passes
from rlhf_fast.lm.dtypes import cast
from rlhf_fast.lm.precision import exact, is_half, trial
from rlhf_fast.lm.switches import difference, trial_rows
from rlhf_fast.rollout import engine
from rlhf_fast.rollout.generate import generate
from tests.support.models import random_policy


def deep(dtype):
    """A model whose bf16 passes differ by far more than the tolerance of a trial, because of its depth and weights."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**shape, num_hidden_layers=24, vocab_size=97, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.copy_(0.25 * torch.randn_like(weight))
    model.to(torch.bfloat16).float()
    cast(model, dtype)
    return model


@torch.no_grad()
@pytest.mark.parametrize("dtype", ["bf16", "mixed"])
def test_a_deep_model_keeps_its_fast_paths(dtype, recwarn):
    model = deep(dtype)
    ids = torch.randint(3, 97, (2, 9))
    generate(model, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens=4, eos_ids=[2], pad_id=0, seed=0)
    assert engine._chosen[model] == "static, packed prompts"
    assert packing.can_pack(model.base_model) and passes._can_pad_left(model)
    assert not [w for w in recwarn if "not used" in str(w.message)]
    with exact(model):
        rows = trial_rows(model, (40,))
        right = model(input_ids=rows[0]).logits
    rounded = model(input_ids=rows[0]).logits.float()
    assert (rounded - right).norm() > 0.01 * right.norm()  # no trial could be as strict as 5e-4 in bf16


@torch.no_grad()
def test_weights_are_the_same_bits_after_a_trial():
    model = deep("mixed")
    before = {name: (p.data_ptr(), p.dtype, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="inside"), exact(model):
        assert not is_half(model) and not torch.is_autocast_enabled("cpu")
        assert model(input_ids=torch.ones(1, 3, dtype=torch.long)).logits.dtype == torch.float32
        raise RuntimeError("inside")
    for name, parameter in model.named_parameters():
        pointer, dtype, values = before[name]
        assert (parameter.data_ptr(), parameter.dtype) == (pointer, dtype) and torch.equal(parameter, values)


@torch.no_grad()
def test_a_wrong_path_is_found_out_in_bf16_and_a_path_that_fails_in_bf16_alone_raises():
    model = deep("bf16")
    (row,) = trial_rows(model, (11,))

    def plain():
        return model(input_ids=row).logits

    assert difference(model, plain, plain, replaces=False) is None
    assert difference(model, plain, lambda: plain() * 1.002, replaces=False) == ""  # less than bf16 rounds
    assert difference(model, plain, lambda: plain() if not is_half(model) else -plain(), replaces=False) == ""
    with pytest.raises(RuntimeError, match="dtype"):
        difference(model, plain, lambda: plain() @ torch.eye(97), replaces=False)


def test_a_trial_leaves_out_layers_like_earlier_layers():
    model = deep("bf16")
    layers, weights = list(model.model.layers), sum(p.numel() for p in model.parameters())
    with trial(model):
        assert list(model.model.layers) == layers[:2] and model.config.num_hidden_layers == 2
        wide = sum(p.numel() for p in model.parameters() if p.dtype == torch.float32)
    assert list(model.model.layers) == layers and model.config.num_hidden_layers == 24
    assert wide < 0.2 * weights
    layers[5].self_attn.scaling *= 2  # a kind of its own
    with trial(model.model):
        assert list(model.model.layers) == layers[:6]
    full = deep("bf16").float()
    with trial(full):
        assert len(full.model.layers) == 24


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "opt", "gemma2", "qwen3"])
def test_trials_of_few_layers_choose_the_paths_of_whole_models(name, recwarn):
    model = random_policy(name).to(torch.bfloat16)
    ids = torch.randint(3, 37, (2, 9))
    generate(model, ids, torch.ones_like(ids, dtype=torch.bool), max_new_tokens=3, eos_ids=[2], pad_id=0, seed=0)
    packs = name != "gemma2"
    assert packing.can_pack(model.base_model) == packs
    assert engine._chosen[model] == ("static, packed prompts" if packs else "static")
