"""The load-balancing loss of experts against transformers' own, in float64: packed, padded, by logits, in parts."""

import pytest
import torch
from torch.nn.functional import pad
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.lm import balance, fast_paths
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.training.learner import checkpoint_activations

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 37,
}
EXPERTS = {"intermediate_size": 48, "num_key_value_heads": 2, "num_experts": 4, "num_local_experts": 4}
EXPERTS |= {"num_experts_per_tok": 2, "head_dim": 8}
ASKED = {"output_router_logits": True, "router_aux_loss_coef": 0.5, "aux_loss_coef": 0.5}
RECURRENT = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
OWN = {
    "mixtral": {},
    "qwen3_moe": {"moe_intermediate_size": 16},
    "olmoe": {},
    "phimoe": {},
    "jetmoe": {"num_attention_heads": None, "kv_channels": 8},  # its attention has routers too
    "granitemoe": {},
    "gpt_oss": {"sliding_window": 4},  # eager attention, so that its rows are padded
    "jamba": RECURRENT
    | {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4},  # its rows run one by one
}


def made(kind="mixtral", **settings):
    torch.manual_seed(0)
    settings = {k: v for k, v in (SIZES | EXPERTS | ASKED | OWN[kind] | settings).items() if v is not None}
    config = AutoConfig.for_model(kind, **settings)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model


def rows(*lengths):
    """Rows with one prompt token, as SFT makes them, and their trained tokens."""
    ids = [torch.arange(n) * 5 % 31 + 2 + i for i, n in enumerate(lengths)]
    ids_BL = torch.stack([pad(row, (0, max(lengths) - len(row))) for row in ids])
    mask_BL = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    sequences = Sequences(ids_BL[:, :1], mask_BL[:, :1], ids_BL[:, 1:], mask_BL[:, 1:])
    return sequences, ids_BL[:, 1:].masked_fill(~mask_BL[:, 1:], -100)


def theirs(model, sequences):
    """The loss of transformers, and its gradient."""
    ids, mask = sequences.input_ids(), sequences.attention_mask()
    model.zero_grad()
    labels = ids.masked_fill(~mask, -100)
    out = model(input_ids=ids, attention_mask=mask.long(), labels=labels, output_router_logits=True)
    out.loss.backward()
    return out, gradient(model)


def gradient(model):
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def close(mine, expected):
    # transformers adds the loss of the routers in float32, whatever the model's dtype is
    torch.testing.assert_close(mine, expected, rtol=1e-5, atol=2e-6, check_dtype=False)


@pytest.mark.parametrize("fused", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("kind", OWN)
def test_sft_equals_transformers(kind, fused):
    model = made(kind)
    objectives = Objectives(model, fused=fused, balanced=True)
    for lengths in ((9,), (9, 5, 7)):
        sequences, tokens = rows(*lengths)
        expected, wanted = theirs(model, sequences)
        model.zero_grad()
        loss = objectives.sft(sequences, tokens, int((tokens != -100).sum())).loss
        loss.backward()
        close(objectives.aux_loss, expected.aux_loss)
        close(loss, expected.loss)
        close(gradient(model), wanted)


def test_with_checkpointed_activations():
    model, (sequences, tokens) = made(), rows(9, 5)
    expected, wanted = theirs(model, sequences)
    objectives = Objectives(model, balanced=True)
    checkpoint_activations(model.train())
    model.zero_grad()
    loss = objectives.sft(sequences, tokens, int((tokens != -100).sum())).loss
    loss.backward()
    close(loss, expected.loss)
    close(gradient(model), wanted)


def test_parts_of_a_batch_are_weighed_by_their_trained_tokens():
    model, objectives, aux = made(), None, []
    objectives = Objectives(model, balanced=True)
    for length in (9, 5):
        sequences, tokens = rows(length)
        aux.append(theirs(model, sequences)[0].aux_loss.item())
        objectives.sft(sequences, tokens, 12)
        assert objectives.aux_loss.item() == pytest.approx((length - 1) / 12 * aux[-1], rel=1e-6)


def test_preferences():
    model, (sequences, _) = made(), rows(9, 5, 7, 6)
    objectives, plain = Objectives(model, balanced=True), Objectives(model)
    aux = theirs(model, sequences)[0].aux_loss.item()
    refs, labels = torch.zeros(4, dtype=torch.double), torch.tensor([True, False, True, True])
    for name, args in {"dpo": ((refs[:2], refs[:2]), 4), "kto": (refs, labels, torch.tensor(0.0), 8)}.items():
        with_it = getattr(objectives, name)(sequences, *args).loss.item()
        without = getattr(plain, name)(sequences, *args).loss.item()
        assert with_it - without == pytest.approx(0.5 * aux / 2, rel=1e-5), name  # half of a batch
        assert objectives.aux_loss.item() == pytest.approx(aux / 2, rel=1e-6)
        assert plain.aux_loss is None
        with torch.no_grad():
            assert getattr(objectives, name)(sequences, *args).loss.item() == pytest.approx(without)


def test_only_where_the_config_asks():
    sequences, tokens = rows(9)
    for settings in ({"output_router_logits": False}, {"router_aux_loss_coef": 0.0}):
        objectives = Objectives(made(**settings), balanced=True)
        objectives.sft(sequences, tokens, 8)
        assert objectives.aux_loss is None


def test_what_is_left_out_is_said(monkeypatch):
    monkeypatch.setattr(fast_paths, "_said", set())
    model = made()
    with pytest.warns(UserWarning, match="output_router_logits is not used for Mixtral.*: PPO has no .*left out"):
        balance.leave_out(model, "PPO")
    monkeypatch.setattr(balance.Routed, "loss", lambda self: torch.tensor(3.0))
    with pytest.warns(UserWarning, match="output_router_logits is not used for Mixtral.*: its .* loss is another"):
        assert not Objectives(model, balanced=True).balanced
