"""Rows as a stage trains on them: which tokens are prompt, trained, end or lost, and what is odd about a row.

The rows go through the very functions of the stages, once with the stage's lengths and once without any. The second
time shows what the lengths take away.
"""

import dataclasses
import re
import sys
from collections import Counter
from typing import Any, Literal, NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf_fast.config import DataConfig, PairsConfig
from rlhf_fast.config.commands import PAIRS
from rlhf_fast.data.examples import Cut
from rlhf_fast.data.rows import Row, place
from rlhf_fast.data.stage_rows import encode_kind, load_stage
from rlhf_fast.data.turns import turns_of
from rlhf_fast.methods import STAGES, load
from rlhf_fast.report.oddities import Part, oddities, parts_of

_NO_LIMITS = sys.maxsize, sys.maxsize
Kind = Literal["prompt", "trained", "end", "lost"]


class Piece(NamedTuple):
    """Tokens of one kind that stand side by side."""

    kind: Kind
    ids: list[int]
    text: str


class Shown(NamedTuple):
    """The prompt with one of its answers, or a conversation."""

    name: str  # chosen, rejected, good, ...; "" where a row has one text
    pieces: list[Piece]

    def count(self, *kinds: Kind) -> int:
        """The number of tokens of these kinds."""
        return sum(len(piece.ids) for piece in self.pieces if piece.kind in kinds)


class Inspected(NamedTuple):
    """An example: a row, or a part of a conversation."""

    number: int  # of the row in its file, from 1
    where: str
    parts: list[Part]  # before anything was cut
    cut: Cut
    odd: list[str]


class Inspection(NamedTuple):
    """Everything that a stage makes of a source."""

    kind: str  # of the rows
    rows: int  # read, the refused ones among them
    refused: list[str]  # what is wrong with rows that stop the stage
    examples: list[Inspected]


def inspect(source: Any, tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Inspection:
    """The rows of `source` under the options of `config`. Raises ValueError for a source that cannot be read at all."""
    refused: list[str] = []
    kind, rows = load_stage(config.stage, source, config.columns, refused)
    number = len(rows) + len(refused)
    rows = _that_encode(kind, rows, tokenizer, config, refused)
    if not rows:
        return Inspection(kind, number, refused, [])
    max_length, max_prompt_length = lengths_of(config)
    kwargs = config.chat_template_kwargs
    short = encode_kind(kind, rows, tokenizer, max_length or sys.maxsize, max_prompt_length, kwargs)
    long = encode_kind(kind, rows, tokenizer, *_NO_LIMITS, kwargs)
    turns, rows_of = turns_of(tokenizer), [cut.row for cut in short.cuts]
    examples, texts_of = [], Counter(rows_of)
    last_of = {row: n for n, row in enumerate(rows_of)}
    for example, cut in zip(long.examples, short.cuts, strict=True):
        row, parts = rows[cut.row], parts_of(example)
        last = parts_of(long.examples[last_of[cut.row]])
        where, odd = place(row, cut.row + 1), oddities(row, parts, last, cut, tokenizer, turns)
        if texts_of[cut.row] > 1:
            odd.append(f"one of {texts_of[cut.row]} texts, because the template writes earlier turns otherwise")
        found = re.search(r"(\d+)$", where)
        examples.append(Inspected(int(found[1]) if found else cut.row + 1, where, parts, cut, odd))
    return Inspection(kind, number, refused, examples)


def lengths_of(config: DataConfig) -> tuple[int | None, int]:
    """(max_length, max_prompt_length): what the config gives, else the stage's defaults. None: the stage has none."""
    config_class = PairsConfig if config.stage == PAIRS else load(STAGES[config.stage].config)
    defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(config_class)}
    prompt = defaults["max_prompt_length"] if config.max_prompt_length is None else config.max_prompt_length
    if "max_length" in defaults:
        return defaults["max_length"] if config.max_length is None else config.max_length, prompt
    if config.max_length is not None:
        expected = f"max_length: expected none with {config.stage}, which reads prompts"
        raise ValueError(f"{expected}; got {config.max_length}")
    return None, prompt


def show(example: Inspected, tokenizer: PreTrainedTokenizerBase) -> list[Shown]:
    """The texts of an example, each as pieces of one kind."""
    ends, shown = set(turns_of(tokenizer).ends.values()), []
    lost = example.cut.answers or (0,)
    for part, cut in zip(example.parts, lost, strict=True):
        ids = part.prompt + part.answer
        kinds: list[Kind] = ["prompt"] * len(part.prompt)
        for n, (token, on) in enumerate(zip(part.answer, part.trained, strict=True)):
            last = n + 1 == len(part.answer) or not part.trained[n + 1]
            kinds.append("prompt" if not on else "end" if last and token in ends else "trained")
        with_bos = ids[0] == tokenizer.bos_token_id and len(part.prompt) > example.cut.prompt + 1  # which stays
        start = int(example.cut.prompt > 0 and with_bos)
        lost_in_front = range(start, start + example.cut.prompt)
        kinds = ["lost" if n in lost_in_front or n >= len(kinds) - cut else kind for n, kind in enumerate(kinds)]
        shown.append(Shown(part.name, _pieces(ids, kinds, tokenizer)))
    return shown


def shared_prompt(texts: list[Shown]) -> tuple[list[Piece], list[Shown]]:
    """The prompt that all texts of a row begin with, and what follows it. Of one text: nothing, and the text."""
    first, same = texts[0].pieces, 0
    for n, piece in enumerate(first if len(texts) > 1 else []):
        if piece.kind in ("trained", "end") or any(text.pieces[n : n + 1] != [piece] for text in texts):
            break
        same = n + 1
    return first[:same], [text._replace(pieces=text.pieces[same:]) for text in texts]


def _pieces(ids: list[int], kinds: list[Kind], tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """A piece's text is what it adds to the text in front of it, because tokenizers decode beginnings otherwise."""
    borders = [0, *(n for n in range(1, len(ids)) if kinds[n] != kinds[n - 1]), len(ids)]
    pieces, before = [], ""
    for start, stop in zip(borders, borders[1:], strict=False):
        text = str(tokenizer.decode(ids[:stop], clean_up_tokenization_spaces=False))
        own = text[len(before) :] if text.startswith(before) else str(tokenizer.decode(ids[start:stop]))
        pieces.append(Piece(kinds[start], ids[start:stop], own))
        before = text
    return pieces


def _that_encode(
    kind: str, rows: list[Row], tokenizer: PreTrainedTokenizerBase, config: DataConfig, refused: list[str]
) -> list[Row]:
    """The rows that can be encoded; what is wrong with the others goes to `refused`."""
    try:
        if rows:
            encode_kind(kind, rows, tokenizer, *_NO_LIMITS, config.chat_template_kwargs)
        return rows
    except ValueError as error:
        first = error
    alone, good = "sft" if kind == "unpaired" else kind, []  # a row of kind unpaired needs a second one beside it
    for row in rows:
        try:
            encode_kind(alone, [row], tokenizer, *_NO_LIMITS, config.chat_template_kwargs)
            good.append(row)
        except ValueError as error:
            refused.append(str(error))
    if len(good) == len(rows):
        raise first
    return good
