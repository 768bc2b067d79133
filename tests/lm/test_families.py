"""Models of every family: which class holds them, and a score head where transformers has none."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.cohere2.modeling_cohere2 import Cohere2PreTrainedModel

from rlhf_fast.lm.adapters import LoRA
from rlhf_fast.lm.families import language_class, scorer_class
from rlhf_fast.lm.loading import load_policy, load_scorer, value_head_on
from rlhf_fast.lm.passes import sequence_scores
from rlhf_fast.lm.saving import save_model
from rlhf_fast.lm.sequences import Sequences
from tests.support.models import random_sequences

SIZES = {"vocab_size": 37, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2} | {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
WINDOW = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
# transformers has no classifier for these, or none with a `score` head
FAMILIES = {
    "cohere2": WINDOW,
    "granite": {},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "attention"]}
    | {"head_dim": 8},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4},
    "llama4_text": {"head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6}
    | {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "qwen3_5_moe_text": {"head_dim": 8, "layer_types": ["linear_attention", "full_attention"], "num_experts": 4}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    | {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8},
}


def made(family: str, directory: Path) -> PreTrainedModel:
    own = FAMILIES[family]
    config = AutoConfig.for_model(family, **(SIZES | own if "n_embd" not in own else {"vocab_size": 37, **own}))
    torch.manual_seed(0)
    model = language_class(config)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    model.save_pretrained(directory)
    return model


def plain_scores(model: PreTrainedModel, sequences: Sequences) -> torch.Tensor:
    """Row by row without padding, in float64 where the family has float64."""
    try:
        model = model.double()
        model.base_model(input_ids=torch.tensor([[2, 3]]), use_cache=False)
    except RuntimeError:
        model = model.float()
    found = []
    for prompt, prompt_mask, response, response_mask in zip(*sequences, strict=True):
        ids = torch.cat([prompt[prompt_mask], response[response_mask]])[None]
        found.append(model.score(model.base_model(input_ids=ids, use_cache=False)[0][0, -1])[0])
    return torch.stack(found)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_score_head_on_a_trunk(family, tmp_path):
    language = made(family, tmp_path / "lm")
    scorer = load_scorer(tmp_path / "lm", trainable=False)
    assert isinstance(scorer, GenericForSequenceClassification) and scorer.score.bias is None
    trunk = language.base_model.state_dict() if language.base_model is not language else language.model.state_dict()
    assert trunk.keys() == scorer.base_model.state_dict().keys()
    assert all(torch.equal(tensor, scorer.base_model.state_dict()[name]) for name, tensor in trunk.items())
    save_model(scorer, tmp_path / "rm")
    again = load_scorer(tmp_path / "rm", head=None, trainable=False)
    assert again.state_dict().keys() == scorer.state_dict().keys()
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in scorer.state_dict().items())
    sequences = random_sequences(prompt=9, response=8)
    scores = sequence_scores(again, sequences)
    torch.testing.assert_close(scores.double(), plain_scores(again, sequences).double(), rtol=1e-4, atol=1e-4)


def test_three_lines_of_transformers_load_such_a_model(tmp_path):
    """As the docs say."""
    made("cohere2", tmp_path / "lm")
    save_model(load_scorer(tmp_path / "lm"), tmp_path / "rm")
    assert json.loads((tmp_path / "rm" / "config.json").read_text())["architectures"] == [
        "Cohere2ForSequenceClassification"
    ]

    class Cohere2ForSequenceClassification(GenericForSequenceClassification, Cohere2PreTrainedModel):
        pass

    model, found = Cohere2ForSequenceClassification.from_pretrained(tmp_path / "rm", output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"] and model.config.num_labels == 1
    with pytest.raises(ValueError, match="^model: expected a language model, got Cohere2ForSequenceClassification at"):
        load_policy(tmp_path / "rm")


def test_such_a_model_with_an_adapter_and_on_the_policys_trunk(tmp_path):
    made("cohere2", tmp_path / "lm")
    sequences, lora = random_sequences(), LoRA(2, 4.0, 0)
    scorer = load_scorer(tmp_path / "lm", lora=lora)
    save_model(scorer, tmp_path / "adapter")
    policy = load_policy(tmp_path / "lm", lora=lora)
    for options in ({"head": None}, {"lora": lora}, {"head": None, "trainable": False, "shared": policy}):
        again = load_scorer(tmp_path / "adapter", **options)
        assert torch.equal(sequence_scores(again, sequences), sequence_scores(scorer, sequences)), options
    value = value_head_on(policy, None)
    torch.nn.init.ones_(value.score.modules_to_save["default"].weight)
    save_model(value, tmp_path / "value")
    twin = value_head_on(policy, tmp_path / "value")
    assert torch.equal(sequence_scores(twin, sequences), sequence_scores(value, sequences))
    assert sequence_scores(value, sequences).abs().min() > 0


def test_a_head_of_another_name_makes_another_class(tmp_path):
    """transformers' CTRLForSequenceClassification has a `classifier`."""
    made("ctrl", tmp_path / "lm")
    save_model(load_scorer(tmp_path / "lm"), tmp_path / "rm")
    config = AutoConfig.from_pretrained(tmp_path / "rm")
    assert config.architectures == ["CTRLScoreForSequenceClassification"]
    assert "score.weight" in load_file(tmp_path / "rm" / "model.safetensors")
    config.architectures = ["CTRLForSequenceClassification"]
    assert scorer_class(config).__module__.startswith("transformers.models.ctrl")
    config.save_pretrained(tmp_path / "rm")
    with pytest.raises(ValueError, match=r"^reward: expected a model with a `score` head \(decoder type\) at"):
        load_scorer(tmp_path / "rm", head=None)


def test_an_encoder_decoder_is_refused_by_its_name(tmp_path):
    config = AutoConfig.for_model("t5", vocab_size=37, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    config.save_pretrained(tmp_path)
    for load in (load_policy, load_scorer):
        with pytest.raises(ValueError, match=r"^model: expected a family .* language models .*, got t5 at \S+$"):
            load(tmp_path)


def test_a_text_model_is_the_auto_classes(tiny_model):
    assert type(load_policy(tiny_model)) is type(AutoModelForCausalLM.from_pretrained(tiny_model))
