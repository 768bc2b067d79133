"""A word-level tokenizer and a small Llama that speaks it. Without a GPU, Triton's kernels run in its interpreter."""

import os

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that share cores must not wait for each other's threads
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported, which reads it
from transformers import PreTrainedTokenizerBase  # noqa: E402

from rlhf_fast.lab.world import build_tokenizer  # noqa: E402
from rlhf_fast.stages.init import init_model  # noqa: E402
from tests.support.models import model_config  # noqa: E402


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
