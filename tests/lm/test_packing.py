"""Rows packed side by side have the hidden states and gradients that each of them has alone, on every architecture."""

import pytest
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast.lm import adapters, layers, packing
from rlhf_fast.lm.packing import real_hidden
from rlhf_fast.ops import backend
from tests.support.models import ARCHITECTURES, random_policy

# Gemma 2 has windows and caps its attention's logits.
PACKED = {name: name != "gemma2" for name in ARCHITECTURES}
# Gemma stores its norms' weights less 1, so what looks like a layer of Llama's is not one.
FUSED = {"llama", "qwen2", "qwen3"}
LENGTHS = (7, 2, 12, 1, 5)
real_norm = layers.add_rms_norm


def padded_anywhere() -> tuple[torch.Tensor, torch.Tensor]:
    """Rows with padding left, right and in between; what the padding holds must not matter."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 37, (len(LENGTHS), 14), generator=generator)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, torch.randperm(14, generator=generator)[:length]] = True
    return ids, mask


def alone(model, ids, mask) -> list[torch.Tensor]:
    return [
        model.base_model(input_ids=row[real][None], use_cache=False).last_hidden_state[0]
        for row, real in zip(ids, mask, strict=True)
    ]


def gradient(model, states) -> torch.Tensor:
    model.zero_grad()
    (states * torch.linspace(-1, 1, states.numel()).view_as(states)).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_and_gradients_are_those_of_each_row_alone(architecture, checkpointing):
    model, (ids, mask) = random_policy(architecture), padded_anywhere()
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)({"use_reentrant": False})
        for module in model.modules():  # only in train mode are activations checkpointed, and there is dropout
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
        model.train()
    assert packing.can_pack(model.base_model) == (PACKED[architecture] and not checkpointing)
    expected = alone(model, ids, mask)
    states, starts = real_hidden(model.base_model, ids, mask)
    if PACKED[architecture] and not checkpointing:
        assert states.shape[0] == sum(LENGTHS)
    rows = [states[start : start + n] for start, n in zip(starts.tolist(), LENGTHS, strict=True)]
    torch.testing.assert_close(torch.cat(rows), torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient(model, torch.cat(rows)), gradient(model, torch.cat(expected)), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_in_few_operations_where_they_compute_the_same(architecture, monkeypatch):
    """Of biases, of norms of heads and of grouped heads too; and no layer stays as it was changed."""
    model, (ids, mask) = random_policy(architecture), padded_anywhere()
    norms = []
    monkeypatch.setattr(layers, "add_rms_norm", lambda *args: norms.append(0) or real_norm(*args))
    expected, _ = real_hidden(model.base_model, ids, mask)
    runs_fused = bool(norms)  # in the trial at least
    del norms[:]
    states, _ = real_hidden(model.base_model, ids, mask)
    assert bool(norms) == (architecture in FUSED) and runs_fused == (architecture in FUSED | {"gemma"})
    assert torch.equal(states, expected)
    assert not any("forward" in vars(module) for module in model.modules())
    if architecture in FUSED:
        with monkeypatch.context() as patch:
            patch.setitem(packing._fusable, model.base_model, False)
            usual, _ = real_hidden(model.base_model, ids, mask)
        torch.testing.assert_close(states, usual, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient(model, states), gradient(model, usual), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_farther_from_float32_than_transformers(dtype, monkeypatch):
    model, (ids, mask) = random_policy("qwen3"), padded_anywhere()
    truth, _ = real_hidden(model.base_model, ids, mask)
    for as_autocast in (True, False):
        half = model if as_autocast else random_policy("qwen3").to(dtype)
        with torch.autocast("cpu", dtype, enabled=as_autocast):
            fused, _ = real_hidden(half.base_model, ids, mask)
            assert packing._fusable[half.base_model]
            with monkeypatch.context() as patch:
                patch.setitem(packing._fusable, half.base_model, False)
                usual, _ = real_hidden(half.base_model, ids, mask)
        mine, theirs = ((states.float() - truth).norm() for states in (fused, usual))
        assert fused.dtype == usual.dtype and mine < 1.2 * theirs and mine < 0.05 * truth.norm()


def test_adapters_and_watched_modules_keep_their_say():
    model, (ids, mask) = random_policy("llama"), padded_anywhere()
    adapters.put_on(model, "nowhere", adapters.LoRA(rank=4, alpha=8, seed=0), trainable=True)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    states, _ = real_hidden(model.base_model, ids, mask)
    assert layers.has_known_layers(model.base_model)
    torch.testing.assert_close(states, torch.cat(alone(model, ids, mask)), rtol=1e-4, atol=1e-5)
    seen = []
    hook = model.base_model.layers[1].mlp.register_forward_hook(lambda *_: seen.append("mlp"))
    assert not layers.has_known_layers(model.base_model)
    real_hidden(model.base_model, ids, mask)
    hook.remove()
    model.base_model.layers[0].register_forward_pre_hook(lambda *_: seen.append("layer"))
    assert layers.has_known_layers(model.base_model)  # layers are called as ever
    real_hidden(model.base_model, ids, mask)
    assert seen == ["mlp", "layer"]


def test_dropout_leaves_layers_as_they_are():
    model = random_policy("llama")
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert layers.has_known_layers(model.base_model)
    assert not layers.has_known_layers(model.train().base_model)


def test_without_the_last_tokens():
    model, (ids, mask) = random_policy("llama"), padded_anywhere()
    states, starts = real_hidden(model.base_model, ids, mask, last=False)
    expected = alone(model, ids, mask)
    assert len(states) == sum(max(1, n - 1) for n in LENGTHS)
    for start, row, n in zip(starts.tolist(), expected, LENGTHS, strict=True):
        torch.testing.assert_close(states[start : start + max(1, n - 1)], row[: max(1, n - 1)], rtol=1e-4, atol=1e-5)


def test_rows_of_one_length_need_no_packing(monkeypatch):
    model = random_policy("llama")
    monkeypatch.setattr(packing, "_packed", None)
    ids = torch.arange(12).view(2, 6)
    with backend("reference"):  # the kernel gains even there
        states, starts = real_hidden(model.base_model, ids, torch.ones_like(ids, dtype=torch.bool))
    assert starts.tolist() == [0, 6]
    torch.testing.assert_close(states, model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1))


def test_a_model_with_windows_is_not_packed():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = MistralConfig(**sizes, num_key_value_heads=2, vocab_size=37, sliding_window=4)
    model, (ids, mask) = AutoModelForCausalLM.from_config(config).eval(), padded_anywhere()
    assert not packing.can_pack(model.base_model)
    states, starts = real_hidden(model.base_model, ids, mask)
    for start, row in zip(starts.tolist(), alone(model, ids, mask), strict=True):
        torch.testing.assert_close(states[start : start + len(row)], row, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["contaminated", "raises"])
def test_a_model_that_packs_wrongly_is_found_out(monkeypatch, attention):
    model = random_policy("llama")

    def wrong(module, query, key, value, layout, **options):
        if attention == "raises":
            raise TypeError("no such mask")
        return sdpa_attention_forward(module, query, key, value, None, **options)

    monkeypatch.setattr(layers, "has_known_layers", lambda _: False)  # these have an attention of their own
    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing._NAME, wrong)
    assert not packing.can_pack(model.base_model)
    assert model.config._attn_implementation == "sdpa"


def test_layers_that_compute_something_else_are_found_out(monkeypatch):
    model, (ids, mask) = random_policy("llama"), padded_anywhere()
    monkeypatch.setattr(layers, "swiglu", lambda gate, up: torch.nn.functional.gelu(gate) * up)
    states, _ = real_hidden(model.base_model, ids, mask)
    assert packing._packable[model.base_model] and not packing._fusable[model.base_model]
    torch.testing.assert_close(states, torch.cat(alone(model, ids, mask)), rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_warns_of_nothing(monkeypatch):
    """transformers looks for the pad id among the ids where it gets no mask."""
    model, (ids, mask) = random_policy("gpt2"), padded_anywhere()
    messages = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning_once", messages.append)
    monkeypatch.setattr(packing, "can_pack", lambda _: False)
    real_hidden(model.base_model, ids, mask)
    assert messages == []


def test_on_fake_tensors_every_row_is_full():
    """As the planner runs it: nothing there has a value, so nothing may be read."""
    model = random_policy("llama")
    with FakeTensorMode(allow_non_fake_inputs=True):
        ids = torch.zeros(3, 8, dtype=torch.long)
        states, starts = real_hidden(model.base_model, ids, torch.ones(3, 8, dtype=torch.bool), last=False)
    assert states.shape == (21, 48) and starts.shape == (3,)


def test_dropout_in_attention_is_applied():
    """By torch's own kernel: ours has none. Dropping everything leaves nothing of the attention."""
    q = torch.randn(1, 2, 5, 8)
    layout = torch.tensor([0, 1, 3, 4, 5]).expand(2, 1, 3, 5)
    out, _ = packing._attention(None, q, q, q, layout, dropout=1.0)
    assert out.shape == (1, 5, 2, 8) and not out.any()
    out, _ = packing._attention(None, q, q, q, layout, dropout=0.0)
    torch.testing.assert_close(out[0, 0], q[0, :, 0])  # a row's first token sees itself alone
