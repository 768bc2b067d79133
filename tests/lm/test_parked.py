"""Text-only training of checkpoints with parts for images: nothing of them is lost, moved or trained."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText

from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.families import language_class
from rlhf_fast.lm.loading import load_policy, load_scorer, value_head_on
from rlhf_fast.lm.objectives import Objectives
from rlhf_fast.lm.passes import sequence_scores
from rlhf_fast.lm.saving import save_model
from rlhf_fast.rollout.generate import generate
from tests.support.models import random_sequences

TEXT = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
QWEN = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
CLIP = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2} | {
    "image_size": 28,
    "patch_size": 14,
}
FAMILIES = {
    "qwen2_5_vl": ({"rope_parameters": ROPE}, QWEN, {"visual"}),
    "qwen3_5": (
        {"layer_types": ["linear_attention", "full_attention"]}
        | {"rope_parameters": ROPE | {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}}
        | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
        | {"linear_value_head_dim": 8},
        QWEN,
        {"visual"},
    ),
    "gemma3": (
        {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        CLIP,
        {"vision_tower", "multi_modal_projector"},
    ),
    "llava": ({"model_type": "llama"}, CLIP | {"model_type": "clip_vision_model"}, {"vision_tower"}),
    "mistral3": ({"model_type": "mistral"}, CLIP | {"model_type": "pixtral"}, {"vision_tower"}),
    "smolvlm": ({"model_type": "llama"}, CLIP, {"vision_model", "connector"}),
    "llama4": (
        {"num_local_experts": 2, "intermediate_size_mlp": 48, "attention_chunk_size": 6}
        | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
        CLIP | {"vision_output_dim": 16, "projector_input_dim": 16, "projector_output_dim": 16},
        {"vision_model", "multi_modal_projector"},
    ),
}


def made(family: str, directory) -> torch.nn.Module:
    text, vision, _ = FAMILIES[family]
    config = AutoConfig.for_model(family, text_config=TEXT | text, vision_config=vision)
    torch.manual_seed(0)
    model = language_class(config)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text('{"size": 28}\n')
    return model


def tensors(directory) -> dict[str, torch.Tensor]:
    (file,) = directory.glob("*.safetensors")
    with safe_open(file, "pt") as weights:
        return {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_text_training_keeps_the_whole_checkpoint(family, tmp_path):
    plain = made(family, tmp_path / "model").double()
    policy, sequences = load_policy(tmp_path / "model"), random_sequences(prompt=9, response=8)
    names = ".".join(name for name, _ in policy.named_parameters())
    assert not any(part in names for part in FAMILIES[family][2])
    with torch.no_grad():
        logprobs = Objectives(policy).logprobs(sequences).logprobs
        for row, (prompt, mask, answer, answered) in enumerate(zip(*sequences, strict=True)):
            ids = torch.cat([prompt[mask], answer[answered]])[None]
            wanted = plain(input_ids=ids, use_cache=False).logits[0, int(mask.sum()) - 1 : -1].log_softmax(-1)
            wanted = wanted.gather(1, answer[answered][:, None])[:, 0]
            torch.testing.assert_close(logprobs[row][answered].double(), wanted, rtol=5e-5, atol=5e-5)
    Objectives(policy).sft(sequences, sequences.response_ids, 1.0).loss.backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    save_model(policy, tmp_path / "out")
    assert same(tensors(tmp_path / "model"), tensors(tmp_path / "out"))
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path / "out")) is type(plain)
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == '{"size": 28}\n'


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_rollouts_and_adapters_of_such_a_model(family, tmp_path):
    plain = made(family, tmp_path / "model").double()
    policy, sequences = load_policy(tmp_path / "model", lora=LoRA(2, 4.0, 0)), random_sequences()
    _, greedy = generate(
        policy,
        sequences.prompt_ids,
        sequences.prompt_mask,
        max_new_tokens=8,
        eos_ids=[1],
        pad_id=0,
        samples=1,
        greedy=True,
    )
    for prompt, mask, answer, answered in zip(*greedy.sequences, strict=True):
        ids = torch.cat([prompt[mask], answer[answered]])[None]
        assert torch.equal(plain(input_ids=ids).logits[0, int(mask.sum()) - 1 : -1].argmax(1), answer[answered])
    save_model(policy, tmp_path / "adapter")
    save_model(load_policy(tmp_path / "adapter"), tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(tmp_path / "model").keys()
    reference = load_policy(tmp_path / "model", trainable=False, shared=policy)
    assert {id(p) for p in reference.parameters()} <= {id(p) for p in policy.parameters()}


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3", "llama4"])
@torch.no_grad()
def test_reward_and_value_models_of_such_a_model(family, tmp_path):
    made(family, tmp_path / "model")
    sequences, scorer = random_sequences(), load_scorer(tmp_path / "model")
    save_model(scorer, tmp_path / "reward")
    again = load_scorer(tmp_path / "reward", head=None, trainable=False)
    assert torch.equal(sequence_scores(again, sequences), sequence_scores(scorer, sequences))
    value = value_head_on(load_policy(tmp_path / "model"), tmp_path / "reward")
    assert torch.equal(sequence_scores(value, sequences), sequence_scores(scorer, sequences))


def test_a_frozen_model_lets_go_of_its_tower(tmp_path):
    made("qwen2_5_vl", tmp_path / "model")
    frozen = load_policy(tmp_path / "model", trainable=False)
    with pytest.raises(ValueError, match="^model: expected all parts of .* to save them, got it without its visual$"):
        save_model(frozen, tmp_path / "out")


def test_models_that_text_alone_does_not_run_are_refused(tmp_path):
    text = TEXT | {"model_type": "gemma"}
    config = AutoConfig.for_model("paligemma", text_config=text, vision_config=CLIP, projection_dim=32)
    language_class(config)(config).save_pretrained(tmp_path / "two_ways")
    with pytest.raises(ValueError, match="^model: expected a decoder, whose logits .* no later token, got PaliGemma"):
        load_policy(tmp_path / "two_ways")
    vision = CLIP | {"num_channels": 3}
    text = {"vocab_size": 37, "embed_dim": 16, "layers": 1, "ffn_dim": 16, "attention_heads": 2}
    config = AutoConfig.for_model("kosmos-2", text_config=text, vision_config=vision, latent_query_num=2)
    language_class(config)(config).save_pretrained(tmp_path / "images")
    with pytest.raises(ValueError, match="^model: expected a model that reads text alone, got Kosmos2.*pixel_values"):
        load_policy(tmp_path / "images")


def test_a_config_that_names_no_class(tmp_path):
    """As in a config.json that somebody wrote by hand."""
    made("qwen3_5", tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    del settings["architectures"]
    path.write_text(json.dumps(settings))
    assert type(load_policy(tmp_path / "model")).__name__ == "Qwen3_5ForConditionalGeneration"
