"""A word-level tokenizer, a small Llama that speaks it, files of rows.

Without a GPU, Triton's kernels run in its interpreter. The fixtures import what they need when a test asks for them,
because the tests of the operations run without the extra `[train]` too.
"""

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers that share cores must not wait for each other's threads
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the package is imported, which reads it
pytest.register_assert_rewrite("tests.support")  # so that its `assert` shows the values, as one of a test does
if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--zoo", default="", help="members of the zoo to test beside the core: all, none or a turn such as 3"
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if find_spec("transformers") is None:
        return
    from tests.support import zoo_turns

    terminalreporter.write_line(zoo_turns.summary(config.getoption("--zoo")))


@pytest.fixture(scope="session")
def tokenizer() -> "PreTrainedTokenizerBase":
    from rlhf_fast.lab.world import build_tokenizer

    return build_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Directory of a small Llama with the world's tokenizer, without checksums, so that tests may edit copies of it."""
    from rlhf_fast.stages.init import init_model
    from tests.support.models import model_config

    directory = tmp_path_factory.mktemp("tiny") / "llama"
    settings = model_config("llama", len(tokenizer))
    del settings["vocab_size"]
    init_model(settings, tokenizer, directory, seed=0)
    (directory / "checkpoint.json").unlink()
    return str(directory)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Files of the world's rows: 96 for SFT, 96 pairs, 96 labelled completions, 32 rankings, 32 prompts."""
    from rlhf_fast.lab.world import preference_rows, prompt_rows, sft_rows
    from tests.support.stages import write_rows

    directory = tmp_path_factory.mktemp("data")
    rows = sft_rows(96, seed=0)
    prompts, completions = [r["prompt"] for r in rows], [r["completion"] for r in rows]
    pairs = preference_rows(prompts, list(zip(completions, completions[1:] + completions[:1], strict=True)), seed=0)
    rankings = [
        {"prompt": p, "completions": completions[i : i + 3], "ranks": [0, 1, 1]} for i, p in enumerate(prompts[:32])
    ]
    labelled = [
        {"prompt": pair["prompt"], "completion": pair[name], "label": name == "chosen"}
        for i, pair in enumerate(pairs)
        for name in [("chosen", "rejected")[i % 3 == 0]]
    ]
    return {
        "sft": write_rows(directory / "sft.jsonl", rows),
        "pairs": write_rows(directory / "pairs.jsonl", pairs),
        "unpaired": write_rows(directory / "unpaired.jsonl", labelled),
        "rankings": write_rows(directory / "rankings.jsonl", rankings),
        "prompts": write_rows(directory / "prompts.jsonl", prompt_rows(32, seed=1)),
    }
