"""Which members of the zoo a run of the tests takes: the core always, the others by turns, or all of them."""

import functools
import subprocess
from pathlib import Path

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.support.zoo import SINCE, ZOO, model_type

# One of each way to decode, to pack and to place a token.
CORE = (
    "llama", "llama llama3", "gpt2", "opt", "gemma3", "mistral", "phi3", "mixtral", "bloom", "roberta", "mamba2",
    "qwen3_next", "nemotron_h",
)  # fmt: skip
TURNS = 6


def members(option: str) -> list[str]:
    """The members of a run. option: of `--zoo`; "" is the turn of the commit."""
    have = tuple(map(int, transformers.__version__.split(".")[:2]))
    known = [name for name in ZOO if model_type(name) in CONFIG_MAPPING_NAMES and SINCE.get(name, (0,)) <= have]
    others = [name for name in known if name not in CORE]
    if option == "all":
        return known
    chosen = [] if option == "none" else others[int(option or _turn_of_commit()) :: TURNS]
    return [name for name in known if name in CORE or name in chosen]


def summary(option: str) -> str:
    """What a run says of the members that it takes."""
    number = len(members(option))
    turn = {"all": "all of it", "none": "the core"}.get(option, f"the core and turn {option or _turn_of_commit()}")
    return f"zoo: {number} of {len(ZOO)} models, {turn} (of {TURNS}); --zoo all takes every model"


@functools.cache
def _turn_of_commit() -> int:
    """The same for every run of a commit; 0 outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return int(found.stdout[:8], 16) % TURNS if found.returncode == 0 else 0
