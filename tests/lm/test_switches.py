"""Trials cross every window and length that a config names; rows on both sides of them have the model's own numbers."""

import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from rlhf_fast.lm import fast_paths, packing, passes, switches
from rlhf_fast.lm.limits import check_completions, context_length, sides
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.packing import real_hidden
from rlhf_fast.lm.sequences import Sequences
from rlhf_fast.rollout import engine
from rlhf_fast.rollout.generate import generate
from tests.support.models import random_policy
from tests.support.zoo_checks import ragged

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": 61, "max_position_embeddings": 256}
SIZES |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "factor": 8.0}
LONG |= {"original_max_position_embeddings": 24, "partial_rotary_factor": 1.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 16.0, "original_max_position_embeddings": 12}
YARN |= {"llama_4_scaling_beta": 0.4, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
ROUTED = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
GEMMA3 = {"sliding_window": 10, "head_dim": 8, "query_pre_attn_scalar": 8}
KINDS = {
    "mistral": {"sliding_window": 10},
    "phi3": {"original_max_position_embeddings": 24, "rope_parameters": LONG},
    "ministral3": {"head_dim": 8, "sliding_window": None, "rope_parameters": YARN},
    "gemma3_text": GEMMA3 | {"layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "qwen3_next": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], **LINEAR, **ROUTED},
    "recurrent_gemma": {"head_dim": 8, "lru_width": 32, "attention_window_size": 64}
    | {"block_types": ["recurrent", "attention"]},
    "rwkv": {"attention_hidden_size": 32},
    "mamba": {"state_size": 8},
    "llama4_text": {"head_dim": 8, "attention_chunk_size": 8, "floor_scale": 12, "intermediate_size_mlp": 48}
    | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0], "num_local_experts": 4},
    "llama": {},
}
STATIC = {"llama", "mistral"}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(fast_paths, "_said", set())


def spread(model: PreTrainedModel) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.35)
    return model.eval()


def made(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return spread(AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])))


def composite() -> PreTrainedModel:
    text = SIZES | GEMMA3 | {"layer_types": ["sliding_attention", "full_attention"]}
    vision = {"model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 16}
    vision |= {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    ids = {"image_token_index": 60, "boi_token_index": 59, "eoi_token_index": 58, "mm_tokens_per_image": 4}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, **ids)
    return spread(AutoModelForImageTextToText.from_config(config))


MIXED = ((14, 18), (2, 3), (9, 12), (1, 30))  # lengths of prompts and responses


@torch.no_grad()
def plain_logprobs(model: PreTrainedModel, sequences: Sequences) -> list[torch.Tensor]:
    """Of each row alone, by transformers in eval mode, without padding and without a cache."""
    found = []
    for p, pm, r, rm in zip(*sequences, strict=True):
        ids = torch.cat([p[pm], r[rm]])[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, int(pm.sum()) - 1 : -1]
        found.append(torch.log_softmax(logits.double(), -1).gather(1, r[rm][:, None])[:, 0].float())
    return found


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("kind", [*KINDS, "gemma3"])
def test_logprobs_are_those_of_each_row_alone(kind, fused):
    model, sequences = composite() if kind == "gemma3" else made(kind), ragged(MIXED)
    expected = plain_logprobs(model, sequences)
    with torch.no_grad():
        out = Objectives(model, fused=fused).logprobs(sequences).logprobs
    for row, (mine, mask) in enumerate(zip(out, sequences.response_mask, strict=True)):
        torch.testing.assert_close(mine[mask], expected[row], rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("kind", [*KINDS, "gemma3"])
def test_decoding_has_the_logprobs_of_each_row_alone(kind):
    model = composite() if kind == "gemma3" else made(kind)
    prompts = ragged(((4, 1), (13, 1), (2, 1), (13, 1)))
    inputs = {"eos_ids": [1], "pad_id": 0, "samples": 2, "greedy": True, "seed": 4}
    tokens = 11 if kind == "phi3" else 14  # phi3 may not cross 24 tokens
    out = generate(model, prompts.prompt_ids, prompts.prompt_mask, max_new_tokens=tokens, **inputs)
    for rollout in out:
        for row, expected in enumerate(plain_logprobs(model, rollout.sequences)):
            mine = rollout.logprobs[row][rollout.response_mask[row]]
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=5e-4)
    assert (engine._chosen[model] in engine._STATIC) == (kind in STATIC)


def test_what_each_model_takes():
    chosen = {}
    for kind in KINDS:
        model = made(kind)
        engine.decoder(model, 4)
        chosen[kind] = engine._chosen[model], passes._can_pad_left(model), packing.can_pack(model.base_model)
    assert chosen == {
        "mistral": ("static", True, False),
        "phi3": ("cache", True, True),
        "ministral3": ("cache", True, True),
        "gemma3_text": ("cache", True, False),
        "lfm2": ("cache", True, False),
        "qwen3_next": ("cache", True, False),
        "recurrent_gemma": ("whole", False, False),
        "rwkv": ("whole", False, False),
        "mamba": ("cache by length", True, False),
        "llama4_text": ("cache by length", False, False),
        "llama": ("static, packed prompts", True, True),
    }


def test_a_path_without_the_window_is_found_out_on_weights_of_any_size(monkeypatch):
    """Weights as they are drawn change less past a window than the tolerance allows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mistral", **SIZES | {"sliding_window": 4096})).eval()
    assert [tuple(switch) for switch in switches.switches(model)] == [("sliding_window", 5), ("sliding_window", 10)]
    assert engine._choice(model) == "static" and model.config.sliding_window == 4096
    read = engine.blocks.read

    def without(model, dtype=None):
        parts = read(model, dtype)
        return parts._replace(blocks=[block._replace(window=None) for block in parts.blocks])

    monkeypatch.setattr(engine.blocks, "read", without)
    with pytest.warns(UserWarning, match="past its sliding_window its own forward gives other logits"):
        assert engine._choice(model) == "cache"


def test_fused_layers_that_leave_out_the_late_scale_are_found_out():
    model = made("ministral3")
    model.config.rope_parameters["original_max_position_embeddings"] = 8192
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert packing.can_pack(model.base_model)
    assert [str(warning.message) for warning in seen if "fused layers are not used" in str(warning.message)]
    assert not packing._fusable[model.base_model]
    assert model.config.rope_parameters["original_max_position_embeddings"] == 8192


def test_models_that_look_ahead_run_row_by_row():
    """BERT sees the tokens behind a token; padding would change them all."""
    torch.manual_seed(0)
    sizes = {key: SIZES[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    backbone = spread(AutoModelForCausalLM.from_config(AutoConfig.for_model("bert", **sizes, num_attention_heads=4)))
    backbone = backbone.base_model
    ids = torch.randint(2, 57, (2, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[1, 4:] = False
    states, starts = real_hidden(backbone, ids, mask)
    expected = backbone(input_ids=ids[1:, :4]).last_hidden_state[0]
    torch.testing.assert_close(states[starts[1] : starts[1] + 4], expected, rtol=1e-4, atol=1e-4)


def test_longrope_rows_at_the_switch():
    """A row of 25 tokens has the long tables, also where its last token is left out because it predicts nothing."""
    model, sequences = made("phi3"), ragged(((12, 13), (12, 12), (20, 9)))
    assert [rows.tolist() for rows in sides(model.config, sequences.attention_mask().sum(dim=1))] == [[1], [0, 2]]
    for rows in ([0], [1], [0, 1, 2]):
        part = sequences.rows(torch.tensor(rows))
        part = part._replace(response_ids=part.response_ids[:, :13], response_mask=part.response_mask[:, :13])
        for fused in (True, False):
            with torch.no_grad():
                out = Objectives(model, fused=fused).logprobs(part).logprobs
            for mine, mask, expected in zip(out, part.response_mask, plain_logprobs(model, part), strict=True):
                torch.testing.assert_close(mine[mask], expected, rtol=1e-4, atol=2e-4)


def test_lengths_that_no_batch_keeps_apart_are_refused():
    model = made("phi3")
    check_completions(model, "max_response_length", [3, 12, 25, 200], 12)
    with pytest.raises(ValueError, match=r"^max_response_length: .* side of 24 tokens, .* a row of 13 \+ 12 = 25$"):
        check_completions(model, "max_response_length", [3, 13], 12)
    mask = torch.ones(1, 13, dtype=torch.bool)
    with pytest.raises(ValueError, match="^max_new_tokens: expected prompts and completions on one side of 24 tokens"):
        generate(model, mask.long(), mask, max_new_tokens=12, eos_ids=[1], pad_id=0)
    check_completions(random_policy("llama"), "max_response_length", [3, 13], 10**6)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    assert context_length(AutoConfig.for_model("llama", **SIZES | {"rope_parameters": dynamic})) == 256
