"""A fast path that is not taken says so once, with the reason; a path that is taken, or not asked for, says nothing."""

import re
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast.lm import fast_paths, layers, packing
from rlhf_fast.lm.packing import real_hidden
from rlhf_fast.ops import backend
from rlhf_fast.rollout import blocks, engine
from tests.support.models import random_policy

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 37}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(fast_paths, "_said", set())


def made(architecture: str, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES | settings)).eval()


def said(call, *args) -> list[str]:
    """What is said in two calls."""
    with warnings.catch_warnings(record=True) as seen, torch.no_grad():
        warnings.simplefilter("always")
        call(*args)
        call(*args)
    return [str(warning.message) for warning in seen if str(warning.message).startswith("rlhf_fast:")]


def pass_through(model: PreTrainedModel) -> None:
    ids, mask = torch.arange(12).view(2, 6), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 4:] = False
    real_hidden(model.base_model, ids, mask)


PADDED, PLAIN = "(rows are padded instead)", "(transformers' own layers run)"
NOT_PACKED = {
    "mpt": (dict(d_model=32, n_heads=4, n_layers=1), "MptModel: its attention is eager, not torch's sdpa"),
    "mistral": (
        dict(intermediate_size=48, num_key_value_heads=2, sliding_window=4),
        "MistralModel: not all of its layers have full attention",
    ),
}


@pytest.mark.parametrize("architecture", NOT_PACKED)
def test_packing_by_the_config(architecture):
    settings, reason = NOT_PACKED[architecture]
    assert said(pass_through, made(architecture, **settings)) == [
        f"rlhf_fast: packed passes are not used for {reason} {PADDED}"
    ]


def test_packing_of_checkpointed_layers():
    model = random_policy("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
    (line,) = said(pass_through, model)
    assert line.startswith("rlhf_fast: packed passes are not used for LlamaModel: its layers run again in the backward")


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        ("contaminated", "two rows side by side have other hidden states than each alone"),
        ("raises", "two rows side by side raise TypeError in it"),
    ],
)
def test_packing_by_the_trial(monkeypatch, attention, reason):
    def wrong(module, query, key, value, layout, **options):
        if attention == "raises":
            raise TypeError("no such mask")
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setattr(layers, "has_known_layers", lambda _: False)
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing._NAME, wrong)
    lines = said(pass_through, random_policy("llama"))
    assert lines == [f"rlhf_fast: packed passes are not used for LlamaModel: {reason} {PADDED}"]


def test_fused_layers():
    said_of = lambda model: said(pass_through, model)  # noqa: E731
    assert said_of(random_policy("gpt2")) == [
        f"rlhf_fast: fused layers are not used for GPT2Model: its layers do not have the parts of Llama's {PLAIN}"
    ]
    watched = random_policy("llama")
    assert said_of(watched) == []
    watched.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    (line,) = said_of(watched)
    assert re.search(r"fused layers are not used for LlamaModel: a module in its layers has a hook", line)
    dropping = random_policy("llama").train()
    dropping.model.layers[1].self_attn.attention_dropout = 0.5
    (line,) = said_of(dropping)
    assert "LlamaModel: its attention has dropout" in line


def test_fused_layers_that_compute_something_else():
    """Gemma keeps its norms' weights less 1."""
    (line,) = said(pass_through, random_policy("gemma"))
    assert line.startswith("rlhf_fast: fused layers are not used for GemmaModel: two rows side by side have other")


def test_decoding():
    granite = made("granite", intermediate_size=48, num_key_value_heads=2, logits_scaling=3.0)
    neox = made("gpt_neox", intermediate_size=48)
    start, end = "rlhf_fast: our own decoding steps are not used for", "(transformers' forward runs with its own cache)"
    reasons = {
        granite: "GraniteForCausalLM: its own forward gives other logits",
        neox: "GPTNeoXForCausalLM: the layout of its layers is not known",
    }
    for model, reason in reasons.items():
        assert said(engine.decoder, model, 4) == [f"{start} {reason} {end}"]


def test_decoding_that_fails(monkeypatch):
    def step(self, tokens):
        raise TypeError("attention: expected a plain tensor")

    monkeypatch.setattr(engine.StaticDecoder, "step", step)
    (line,) = said(engine.decoder, random_policy("llama"), 4)
    assert "LlamaForCausalLM: a step over its weights raises TypeError" in line


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_paths_that_are_taken_say_nothing(architecture):
    model = random_policy(architecture)
    assert said(pass_through, model) == said(engine.decoder, model, 4) == []
    assert blocks.read(model) is not None and packing._fusable[model.base_model]


def test_paths_that_are_not_asked_for_say_nothing():
    """Rows of one length gain nothing from packing where there is no kernel, nor are layers fused there."""
    model = random_policy("gpt2")
    with backend("reference"):
        assert said(pass_through, model) == []
        full = torch.ones(2, 6, dtype=torch.bool)
        windows = made("mistral", **NOT_PACKED["mistral"][0])
        assert said(real_hidden, windows.base_model, torch.arange(12).view(2, 6), full) == []


def test_another_model_of_the_class_says_nothing_more():
    assert len(said(lambda: pass_through(random_policy("gpt2")))) == 1
