"""Models that no decoding could give the probabilities of training are refused before the first step."""

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rlhf_fast.lm.causal import check_decoder, check_family
from tests.support.models import random_policy
from tests.support.zoo import make_config


def made(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(make_config(name))


def test_decoders_pass_and_stay_in_their_mode():
    for model in (random_policy("llama").train(), made("bert")):
        check_decoder(model)
        assert model.training


def test_a_model_that_looks_ahead():
    model = made("bert that looks ahead")
    with pytest.raises(ValueError, match="no later token, got BertLMHeadModel; set is_decoder in its config$"):
        check_decoder(model)
    assert model.training


def test_a_model_that_takes_more_than_tokens(monkeypatch):
    model = random_policy("llama")

    def forward(**inputs):
        raise TypeError("expected pixel_values\nand more")

    monkeypatch.setattr(model, "forward", forward)
    with pytest.raises(
        ValueError, match="alone, got LlamaForCausalLM, whose forward raises TypeError: expected pixel_values$"
    ):
        check_decoder(model)


def test_a_family_that_no_trial_tells():
    config = PreTrainedConfig(architectures=["ReformerModelWithLMHead"])
    check_family(config, "here")
    config.model_type = "reformer"
    with pytest.raises(
        ValueError, match="^model: expected .* got ReformerModelWithLMHead at here, which sorts its keys"
    ):
        check_family(config, "here")
