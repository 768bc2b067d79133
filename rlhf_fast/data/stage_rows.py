"""The rows of a stage: which kind of rows a stage takes, and how it encodes them. `rlhf-fast data` shows the same."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import TemplateOptions
from rlhf_fast.data.encoding import (
    encode_preferences,
    encode_prompts,
    encode_rankings,
    encode_sft,
    encode_unpaired,
)
from rlhf_fast.data.examples import Encoded
from rlhf_fast.data.rows import Row, load_rows, load_unpaired, read_rows
from rlhf_fast.methods import STAGES

_ENCODERS = {
    "sft": encode_sft,
    "preference": encode_preferences,
    "ranking": encode_rankings,
    "unpaired": encode_unpaired,
}


class RowOptions(Protocol):
    """What a stage's config says about its rows; `max_length` where the stage passes over rows with answers."""

    @property
    def columns(self) -> Mapping[str, str]: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...
    @property
    def max_prompt_length(self) -> int: ...


def load_stage(
    stage: str, source: str | Path | Iterable[Row], columns: Mapping[str, str], errors: list[str] | None = None
) -> tuple[str, list[Row]]:
    """The kind and the rows of `source` as the stage named `stage` takes them. errors: as in `load_rows`."""
    kind = STAGES[stage].rows if stage in STAGES else "prompt"
    if stage == "reward":
        _, first = next(iter(read_rows(source)), ("", {}))
        ranks, completions, chosen = (columns.get(name, name) for name in ("ranks", "completions", "chosen"))
        ranked = isinstance(first, dict) and (ranks in first or (completions in first and chosen not in first))
        kind = "ranking" if ranked else kind
    if kind == "unpaired":
        return kind, load_unpaired(source, columns, errors)
    return kind, load_rows(source, kind, columns, errors)


def encode_stage(
    stage: str, source: str | Path | Iterable[Row], tokenizer: PreTrainedTokenizerBase, options: RowOptions
) -> Encoded:
    """The rows of `source` as the stage trains on them. options: the stage's config."""
    kind, rows = load_stage(stage, source, options.columns)
    lengths = getattr(options, "max_length", 0), options.max_prompt_length
    return encode_kind(kind, rows, tokenizer, *lengths, options.chat_template_kwargs)


def encode_kind(
    kind: str,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions,
) -> Encoded:
    """Rows of one kind, encoded. Prompts have no max_length."""
    if kind == "prompt":
        return encode_prompts(rows, tokenizer, max_prompt_length, chat_template_kwargs)
    return _ENCODERS[kind](rows, tokenizer, max_length, max_prompt_length, chat_template_kwargs)
