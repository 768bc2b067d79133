"""A model's tokenizer, and whether two models read the same token ids."""

import json
from pathlib import Path

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers import __version__ as VERSION

from rlhf_fast.data.damage import read_json
from rlhf_fast.data.turns import note_listed_ends
from rlhf_fast.lm import adapters
from rlhf_fast.lm.damage import names_damage
from rlhf_fast.lm.paths import beside, existing
from rlhf_fast.lm.trust import OPTION, trusted


@names_damage
def load_tokenizer(path: str | Path, argument: str = "model") -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`. argument: the name that messages give `path`.

    A pad token without an embedding in the model is taken off, because the model looks up padding too, although no
    mask lets it count. EOS then takes its place. Raises ValueError where EOS has no embedding either.

    The tokenizer keeps the ends that the model's generation config lists, because `data.turns` looks at them.
    """
    found = existing(path, argument)
    try:
        tokenizer = AutoTokenizer.from_pretrained(found, trust_remote_code=trusted())
    except ValueError as error:
        if trusted() or "trust_remote_code" not in str(error):
            raise
        code = f"got one whose code stands beside it at {path}; {OPTION} runs it"
        raise ValueError(f"{argument}: expected a tokenizer of transformers {VERSION}, {code}") from error
    base = adapters.base_path(path)
    if tokenizer.chat_template is None:  # a processor's template, as LLaVA's checkpoints have it
        template = beside(str(path), ["chat_template.json"]).get("chat_template.json")
        tokenizer.chat_template = None if template is None else json.loads(template).get("chat_template")
    if Path(base).is_dir() and not Path(base, "config.json").is_file():
        return tokenizer
    config = AutoConfig.from_pretrained(existing(base, argument), trust_remote_code=trusted()).get_text_config()
    embeddings = config.vocab_size
    ids = _listed_ends(base, getattr(config, "eos_token_id", None))
    note_listed_ends(tokenizer, [n for n in ids if isinstance(n, int) and n < len(tokenizer)])
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id >= embeddings:
        tokenizer.pad_token = None
    if tokenizer.pad_token_id is None and (tokenizer.eos_token_id or 0) >= embeddings:
        raise ValueError(
            f"{argument}: expected a pad or an EOS token among the {embeddings} embeddings of the model at {path}, got "
            f"{tokenizer.eos_token!r} with id {tokenizer.eos_token_id}"
        )
    return tokenizer


def _listed_ends(path: str | Path, default: int | list[int] | None) -> list[int | None]:
    """The ends that the generation config of a checkpoint lists, or those of the model's config without such a file."""
    if (file := Path(path, "generation_config.json")).is_file():
        read_json(file)  # of a damaged file transformers says that there is none
    try:
        ids = GenerationConfig.from_pretrained(path).eos_token_id
    except OSError:  # there is no such file
        ids = default
    return list(ids) if isinstance(ids, list | tuple) else [ids]


def check_tokenizer(path: str | Path, tokenizer: PreTrainedTokenizerBase, argument: str) -> None:
    """ValueError unless the model at `path` reads the token ids of the policy's `tokenizer`.

    A directory without a tokenizer is not checked.
    """
    if Path(existing(path, argument)).is_dir() and not Path(path, "tokenizer_config.json").is_file():
        return
    if load_tokenizer(path, argument).get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"{argument}: expected a model with the policy's tokenizer, found another in {path}")
