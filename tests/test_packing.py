"""Rows packed side by side have the hidden states and gradients that each of them has alone, on every architecture."""

import pytest
import torch
from tiny_models import ARCHITECTURES, random_policy
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, MistralConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rlhf_fast import packing
from rlhf_fast.ops import backend
from rlhf_fast.packing import real_hidden

# Gemma 2 has windows and caps its attention's logits.
PACKED = {name: name != "gemma2" for name in ARCHITECTURES}
LENGTHS = (7, 2, 12, 1, 5)


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
    assert packing._can_pack(model.base_model) == (PACKED[architecture] and not checkpointing)
    expected = alone(model, ids, mask)
    states, starts = real_hidden(model.base_model, ids, mask)
    if PACKED[architecture] and not checkpointing:
        assert states.shape[0] == sum(LENGTHS)
    rows = [states[start : start + n] for start, n in zip(starts.tolist(), LENGTHS, strict=True)]
    torch.testing.assert_close(torch.cat(rows), torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient(model, torch.cat(rows)), gradient(model, torch.cat(expected)), rtol=1e-3, atol=1e-3
    )


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
    assert not packing._can_pack(model.base_model)
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

    monkeypatch.setitem(packing.AttentionInterface._global_mapping, packing._NAME, wrong)
    assert not packing._can_pack(model.base_model)
    assert model.config._attn_implementation == "sdpa"


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
