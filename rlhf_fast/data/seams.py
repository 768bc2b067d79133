"""Texts to token ids, and the borders within them.

A text is tokenized as a whole, as a model meets it at inference. Tokenizers of the SentencePiece family write a space
in front of every text they get, so parts that are tokenized apart and joined have ids that no text has.

Between a prompt and an answer the prompt's own ids come first in any case, because the model answers behind these ids.
Mostly the ids of the whole text begin with them, and the row has the ids of the whole text. A token may also hold the
last characters of the prompt and the first of the answer: "2+2=" and "4" as the token "=4". No answer behind the
prompt's own ids can have this token. The answer is then tokenized as a text that goes on, without the space in front.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from os.path import commonprefix
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

_BREAK = "\n"  # in front of an answer that is tokenized apart: a text that no token shares with words


class Tokens(NamedTuple):
    """A text's ids, and its spans of characters as spans of tokens."""

    ids: list[int]
    spans: list[tuple[int, int]]  # from, up to; a token that stands partly in a span belongs to it
    clean: bool  # whether a token ends where the first span begins


def tokenize(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], spans: Sequence[Sequence[tuple[int, int]]]
) -> list[Tokens]:
    """Every text as a whole, with its spans of characters [from, up to)."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    if encoded.encodings is None:
        return [_without_places(tokenizer, *row) for row in zip(texts, ids, spans, strict=True)]
    rows = zip(texts, ids, encoded.encodings, spans, strict=True)
    return [_with_places(text, row, encoding.offsets, own) for text, row, encoding, own in rows]


def split(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], borders: Sequence[int]
) -> list[tuple[list[int], int]]:
    """The ids of every text, and how many of them are the ids of its prompt, which ends at `borders`."""
    whole = tokenize(tokenizer, texts, [[(border, len(text))] for text, border in zip(texts, borders, strict=True)])
    found = [(tokens.ids, tokens.spans[0][0]) for tokens in whole]
    apart = [n for n, tokens in enumerate(whole) if not tokens.clean]
    if apart:
        heads = _ids(tokenizer, [texts[n][: borders[n]] for n in apart])
        tails = _continued(tokenizer, [texts[n][borders[n] :] for n in apart])
        for n, head, tail in zip(apart, heads, tails, strict=True):
            found[n] = head + tail, len(head)
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # pyright: ignore[reportReturnType]


def _continued(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """The ids of texts that go on: behind a line break, which is taken off again."""
    start, *behind = _ids(tokenizer, [_BREAK, *(_BREAK + text for text in texts)])
    return [
        ids[len(start) :] if ids[: len(start)] == start else alone
        for ids, alone in zip(behind, _ids(tokenizer, texts), strict=True)
    ]


def _with_places(text: str, ids: list[int], offsets: list[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> Tokens:
    """offsets: the place of every token, which byte-level tokenizers give without the spaces at its ends."""
    found = []
    for begin, stop in spans:
        start = bisect_right(offsets, begin, key=lambda token: token[1])  # the first token that ends behind `begin`
        last = len(offsets) if stop >= len(text) else bisect_left(offsets, stop, key=lambda token: token[0])
        found.append((start, max(start, last)))
    start, border = found[0][0], spans[0][0]
    clean = not border or (start > 0 and offsets[start - 1][1] == border)
    return Tokens(ids, found, clean and (start == len(offsets) or offsets[start][0] >= border))


def _without_places(
    tokenizer: PreTrainedTokenizerBase, text: str, ids: list[int], spans: Sequence[tuple[int, int]]
) -> Tokens:
    """For a tokenizer that does not know its tokens' places: by the ids that beginnings of the text share with it."""
    borders = [border for span in spans for border in span]
    heads = _ids(tokenizer, [text[:border] for border in borders])
    shared = [len(commonprefix([head, ids])) for head in heads]
    return Tokens(ids, list(zip(shared[::2], shared[1::2], strict=True)), shared[0] == len(heads[0]))
