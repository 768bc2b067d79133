"""A tokenizer of six letters in place of the world's words."""

import pytest
from transformers import PreTrainedTokenizerFast

from tests.support.text import word_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(eos_token="<eos>", pad_token="<pad>")
