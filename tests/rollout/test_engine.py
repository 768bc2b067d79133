"""Our own one-token step against transformers' forward with its own cache."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.lm import fast_paths, packing
from rlhf_fast.rollout import blocks, cpu, engine
from tests.support.models import ARCHITECTURES, random_policy, random_sequences


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def _decoders(model, new_tokens):
    return engine.StaticDecoder(model, blocks.read(model), new_tokens), engine.CacheDecoder(model)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(fast_paths, "_said", set())


@pytest.fixture(params=["compiled", "plain"])
def kernels(request, monkeypatch):
    """The compiled CPU kernels, and the plain PyTorch that runs elsewhere."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "COMPILED", False)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_steps_give_the_models_logits_while_rows_leave(architecture, kernels):
    model, sequences = random_policy(architecture), random_sequences(rows=4, prompt=9, seed=3)
    generator = torch.Generator().manual_seed(0)
    rows, kept = torch.arange(8), [5, 2, 1]  # rows left after the steps with these numbers
    decoders = _decoders(model, 15)
    logits = [d.prefill(sequences.prompt_ids, sequences.prompt_mask, 2) for d in decoders]
    orders = [rows, rows]
    for step in range(15):
        by_row = [dict(zip(o.tolist(), x, strict=True)) for o, x in zip(orders, logits, strict=True)]
        assert by_row[0].keys() == by_row[1].keys()
        for row in by_row[0]:
            torch.testing.assert_close(by_row[0][row], by_row[1][row], rtol=1e-4, atol=1e-4)
        if step in (3, 7, 11):
            keep = set(torch.randperm(8, generator=generator).tolist()) & by_row[0].keys()
            keep = sorted(keep)[: kept[step // 4]]
            for i, d in enumerate(decoders):
                mask = torch.tensor([row in keep for row in orders[i].tolist()])
                orders[i] = orders[i][d.keep(mask.nonzero().squeeze(1))]
        token = torch.randint(2, 37, (8,), generator=generator)
        logits = [d.step(token[o]) for d, o in zip(decoders, orders, strict=True)]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "opt"])
@pytest.mark.parametrize("own_layers", [False, True])
def test_packed_prompts_fill_the_cache_that_padded_prompts_fill(architecture, own_layers, monkeypatch):
    """Logits, real slots of the cache and what is decoded from them; by fused layers and by transformers' layers."""
    model, sequences = random_policy(architecture), random_sequences(rows=5, prompt=9, seed=3)
    assert packing.packs_prompts(model.base_model) and not sequences.prompt_mask.all()
    if own_layers:
        monkeypatch.setitem(packing._fusable, model.base_model, False)
    padded, packed = (engine.StaticDecoder(model, blocks.read(model), 4, packs=packs) for packs in (False, True))
    logits = [d.prefill(sequences.prompt_ids, sequences.prompt_mask, 3) for d in (packed, padded)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
    real = sequences.prompt_mask.repeat_interleave(3, dim=0)
    caches = [d.cache.transpose(2, 3)[:, :, :9][:, real] for d in (packed, padded)]
    torch.testing.assert_close(*caches, rtol=1e-5, atol=1e-5)
    assert not packed.cache.transpose(2, 3)[:, :, :9][:, ~real].any()
    for token in torch.randint(2, 37, (3, 15), generator=torch.Generator().manual_seed(0)):
        torch.testing.assert_close(packed.step(token), padded.step(token), rtol=1e-4, atol=1e-4)


def test_prompts_of_a_model_that_checkpoints_its_activations_are_packed(recwarn):
    """And nothing is said of training's passes, which are not."""
    model = random_policy("llama")
    model.gradient_checkpointing_enable()
    assert isinstance(engine.decoder(model, 4), engine.StaticDecoder)
    assert engine._chosen[model] == "static, packed prompts"
    assert not [w for w in recwarn if "not used" in str(w.message)]
    with pytest.warns(UserWarning, match="packed passes are not used for LlamaModel: its layers run again"):
        assert not packing.can_pack(model.base_model)


def test_sampling_says_nothing_of_training(recwarn):
    model = random_policy("gemma2")
    assert isinstance(engine.decoder(model, 4), engine.StaticDecoder) and engine._chosen[model] == "static"
    assert not [w for w in recwarn if "not used" in str(w.message)]
    with pytest.warns(UserWarning, match="packed passes are not used for Gemma2Model"):
        assert not packing.can_pack(model.base_model)


def test_a_packed_pass_that_goes_wrong_over_prompts_is_not_taken(monkeypatch):
    model, states = random_policy("llama"), engine.prompt_states

    def wrong(*args):
        found, slots = states(*args)
        return found.roll(1, dims=0), slots

    monkeypatch.setattr(engine, "prompt_states", wrong)
    with pytest.warns(UserWarning, match="packed prompts are not used for LlamaForCausalLM: its own"):
        assert engine._choice(model) == "static"
    monkeypatch.undo()
    assert engine._choice(model) == "static, packed prompts"


def test_the_step_is_the_same_program_at_every_place(monkeypatch):
    """A trace of the first step replays the later ones, as a CUDA graph does: no place or length is baked in."""
    monkeypatch.setattr(cpu, "COMPILED", False)
    model, sequences = random_policy("gemma2"), random_sequences(rows=4, prompt=9)
    traced, plain = (engine.StaticDecoder(model, blocks.read(model), 12) for _ in range(2))
    for d in (traced, plain):
        d.prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
        d._look(10)
    tokens = torch.randint(2, 37, (12, 4), generator=torch.Generator().manual_seed(0))
    state = [x.clone() for x in (traced.slot, traced.position, traced.cache, *traced.masks.values())]
    graph = make_fx(lambda token: traced._step(token))(tokens[0])
    for x, before in zip((traced.slot, traced.position, traced.cache, *traced.masks.values()), state, strict=True):
        x.copy_(before)  # tracing ran the step
    for token in tokens:
        torch.testing.assert_close(graph(token), plain.step(token), rtol=0, atol=0)


def test_layouts_that_only_look_alike_go_through_transformers():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    granite = AutoConfig.for_model("granite", vocab_size=37, logits_scaling=3.0, residual_multiplier=0.5, **sizes)
    neox = AutoConfig.for_model("gpt_neox", vocab_size=37, **sizes)
    for config in (granite, neox):
        model = AutoModelForCausalLM.from_config(config).eval()
        assert isinstance(engine.decoder(model, 4), engine.CacheDecoder)
    assert isinstance(engine.decoder(random_policy("llama"), 4), engine.StaticDecoder)


def test_changed_weights_are_seen():
    model, sequences = random_policy("llama"), random_sequences(rows=3)
    tokens = torch.tensor([3, 4, 5])
    for _ in range(2):
        mine, own = engine.decoder(model, 2), engine.CacheDecoder(model)
        for d in (mine, own):
            d.prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
        torch.testing.assert_close(mine.step(tokens), own.step(tokens), rtol=1e-4, atol=1e-4)
        for parameter in model.parameters():
            parameter.mul_(0.9)


def test_bfloat16_autocast(kernels):
    model, sequences = random_policy("llama"), random_sequences(rows=3)
    tokens = torch.tensor([3, 4, 5])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mine, own = engine.decoder(model, 2), engine.CacheDecoder(model)
        assert isinstance(mine, engine.StaticDecoder)
        for d in (mine, own):
            d.prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
        a, b = mine.step(tokens), own.step(tokens)
    assert a.dtype == b.dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0, atol=0.03 * b.abs().max().item())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("most_copied", [0, 1 << 20])
def test_lora_adapters_added_to_small_weights_and_called_on_large_ones(architecture, most_copied, monkeypatch):
    monkeypatch.setattr(blocks, "_MOST_COPIED", most_copied)
    model, sequences = random_policy(architecture), random_sequences(rows=3)
    before = engine.CacheDecoder(model).prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
    inject_adapter_in_model(LoraConfig(r=4, target_modules="all-linear"), model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(0))
    mine, own = engine.decoder(model, 3), engine.CacheDecoder(model)
    assert isinstance(mine, engine.StaticDecoder)
    logits = [d.prefill(sequences.prompt_ids, sequences.prompt_mask, 1) for d in (mine, own)]
    assert (logits[0] - before).abs().max() > 0.1
    for token in torch.tensor([[3, 4, 5], [6, 7, 8]]):
        torch.testing.assert_close(*(d.step(token) for d in (mine, own)), rtol=1e-4, atol=1e-4)


def test_norms_of_bf16_heads_warn_of_nothing(recwarn):
    model, sequences = random_policy("qwen3"), random_sequences()
    with torch.autocast("cpu", torch.bfloat16):
        decoder = engine.decoder(model, 2)
        assert isinstance(decoder, engine.StaticDecoder)
        decoder.prefill(sequences.prompt_ids, sequences.prompt_mask, 1)
        decoder.step(sequences.response_ids[:, 0])
    assert not [warning for warning in recwarn if "Mismatch dtype" in str(warning.message)]
