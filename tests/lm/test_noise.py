"""Dropout is off: passes in train mode are those of eval mode, whatever a model calls its noise."""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rlhf_fast.lm import noise
from rlhf_fast.lm.loading import load_policy, load_scorer
from rlhf_fast.lm.noise import as_before, silence
from rlhf_fast.lm.saving import save_model

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 37}
GATED = {"intermediate_size": 48, "num_key_value_heads": 2}
EXPERTS = GATED | {"num_local_experts": 4, "num_experts_per_tok": 2, "router_jitter_noise": 0.1}
IDS = torch.arange(2, 14)[None]
NOISY = {
    "llama": GATED | {"attention_dropout": 0.3},
    "mixtral": EXPERTS,  # jitters its router's input
    "phimoe": EXPERTS | {"input_jitter_noise": 0.1},  # samples its routing; its jitter counts in eval mode too
    "falcon": {"hidden_dropout": 0.1, "attention_dropout": 0.1, "new_decoder_architecture": False},  # by its config
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.2, "layerdrop": 0.5},
}


def made(architecture: str, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(architecture, **SIZES | NOISY[architecture] | settings)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("architecture", NOISY)
@torch.no_grad()
def test_train_mode_gives_the_numbers_of_eval_mode(architecture):
    model = made(architecture)
    expected, state = model(IDS).logits, torch.get_rng_state()
    assert not torch.equal(model.train()(IDS).logits, expected)
    torch.set_rng_state(state)
    silence(model)
    assert torch.equal(torch.get_rng_state(), state)  # the trial draws nothing from the caller's stream
    for _ in range(3):
        torch.testing.assert_close(model.train()(IDS).logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.eval()(IDS).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(copy.deepcopy(model).train()(IDS).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_routing_that_is_sure_of_itself_is_still_sampled():
    """The two passes of a trial agree here, because they choose the same experts. Passes over more tokens would not."""
    model = made("phimoe", router_jitter_noise=0.0, input_jitter_noise=0.0, lm_head_bias=False)
    for layer in model.model.layers:
        layer.mlp.router.weight.mul_(300)
    assert torch.equal(*(noise._trial(model, training=True) for _ in range(2)))
    silence(model)
    state = torch.get_rng_state()
    model.train()(IDS)
    assert torch.equal(torch.get_rng_state(), state)


@torch.no_grad()
def test_rates_of_configs_at_any_depth():
    """A whole number is a rate too."""
    model = made("llama")
    inner, outer = AutoConfig.for_model("falcon", hidden_dropout=0.3), AutoConfig.for_model("mpt", attn_pdrop=1)
    outer.inner, model.config.outer = inner, outer
    silence(model)
    assert (inner.hidden_dropout, outer.attn_pdrop) == (0.0, 0)
    with as_before(model):
        assert (inner.hidden_dropout, outer.attn_pdrop) == (0.3, 1)


@pytest.mark.parametrize("architecture", ["phimoe", "falcon"])
def test_activations_are_checkpointed_all_the_same(architecture):
    model = made(architecture)
    silence(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    for module in model.modules():
        if "Attention" in type(module).__name__:
            module.register_forward_hook(lambda *_: runs.append(1))
    model.train()(IDS).logits.sum().backward()
    assert len(runs) == 4  # each of two layers ran again in the backward pass


def test_noise_that_stays_is_an_error(monkeypatch):
    """Raised before the first step, in one line."""
    model = made("llama")
    layer = model.model.layers[0]
    forward = layer.forward
    layer.forward = lambda x, **options: forward(x + torch.rand(()) * model.training, **options)
    with pytest.raises(ValueError, match="^model: expected passes without noise in train mode, .* LlamaForCausalLM$"):
        silence(model)


def test_a_saved_model_keeps_its_rates(tmp_path):
    made("falcon").save_pretrained(tmp_path / "before")
    model = load_policy(tmp_path / "before")
    assert (model.config.hidden_dropout, model.config.attention_dropout) == (0.0, 0.0)
    with as_before(copy.deepcopy(model)) as _, as_before(model):
        assert model.config.hidden_dropout == 0.1
    assert model.config.hidden_dropout == 0.0
    save_model(model, tmp_path / "after")
    saved = AutoConfig.from_pretrained(tmp_path / "after")
    assert (saved.hidden_dropout, saved.attention_dropout) == (0.1, 0.1)


def test_a_frozen_model_runs_no_trial(tmp_path, monkeypatch):
    made("llama").save_pretrained(tmp_path)
    trials = []
    trial = noise._trial
    monkeypatch.setattr(noise, "_trial", lambda *args, **options: trials.append(1) or trial(*args, **options))
    load_policy(tmp_path, trainable=False)
    load_scorer(tmp_path, trainable=False)
    assert not trials
    load_policy(tmp_path)
    assert trials
