"""Models that are saved in several files."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_fast.lm import saving
from rlhf_fast.lm.sharding import pieces_of
from tests.support.models import model_config
from tests.support.zoo import make_config


def model_of(name: str):
    torch.manual_seed(0)
    if name == "tied":
        settings = model_config("llama", 37) | {"tie_word_embeddings": True}
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    return AutoModelForCausalLM.from_config(make_config(name))


@pytest.mark.parametrize("name", ["tied", "mixtral", "qwen3_moe", "gpt2", "zamba"])
def test_several_files_hold_what_one_file_holds(name, tmp_path, monkeypatch):
    """Under the names of files: mixtral's experts stand side by side in one weight of the model."""
    model = model_of(name)
    model.save_pretrained(tmp_path / "one")
    monkeypatch.setattr(saving, "FILE_BYTES", 1)
    saving._save_from_parts(model, tmp_path / "several")
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) == len(pieces_of(model, 1)) == (1 if name == "zamba" else 1 + model.config.num_hidden_layers)
    one = load_file(tmp_path / "one" / "model.safetensors")
    several = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert one.keys() == several.keys()
    assert all(torch.equal(tensor, several[key]) for key, tensor in one.items())
    for file in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "one" / file).read_text()) == json.loads(
            (tmp_path / "several" / file).read_text()
        )
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "several")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_pieces_have_about_the_bytes_that_are_asked_for():
    model = model_of("tied")
    layer = sum(p.nbytes for p in model.model.layers[0].parameters())
    root = sum(p.nbytes for p in model.parameters()) - 2 * layer
    assert [len(pieces_of(model, most)) for most in (1, root + layer, root + 2 * layer)] == [3, 2, 1]
