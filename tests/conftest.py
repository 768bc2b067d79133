"""A word-level tokenizer and a small Llama that speaks it."""

import pytest
from tiny_models import model_config
from transformers import PreTrainedTokenizerBase

from rlhf_fast.tokenizers import init_model
from rlhf_fast.world import build_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerBase:
    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """Directory of a small Llama with the world's tokenizer."""
    directory = tmp_path_factory.mktemp("tiny") / "llama"
    settings = model_config("llama", len(tokenizer))
    del settings["vocab_size"]
    init_model(settings, tokenizer, directory, seed=0)
    return str(directory)
