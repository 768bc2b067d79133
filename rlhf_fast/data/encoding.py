"""Rows in, token ids out: encoding every kind of training data, and making batches of it.

- Prompt and completion are tokenized apart and joined, so no token stands on both sides of the border. If the tokenizer
  adds BOS, it comes once, at the start. Every finished completion ends in EOS.
- A completion that a length limit cut off has no end, so no EOS follows it. Its row says so by `chosen_finished`,
  `rejected_finished` or `completion_finished`: false. `pairs` writes these columns.
- Only completion tokens and their EOS are trained on. Masks are explicit and never derived from token ids, so pad ==
  eos and a tokenizer without a pad token change nothing.
- Conversations (a `messages` column, or a prompt that is a list of messages) go through the tokenizer's chat template.
- A row that is too long loses the left end of its prompt. A completion that is too long by itself loses its right end
  and its EOS, because the text does not end there. `Encoded.truncated` counts both.

Left out: packing several rows into one sequence.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.rows import Row, load_rows, place

__all__ = [
    "Encoded",
    "PreferenceExample",
    "PromptExample",
    "RankingExample",
    "SFTExample",
    "UnpairedExample",
    "encode_preferences",
    "encode_prompts",
    "encode_rankings",
    "encode_sft",
    "encode_texts",
    "encode_unpaired",
    "epoch_batches",
    "load_rows",
    "pad_id",
    "pad_left",
    "pad_right",
]


class SFTExample(NamedTuple):
    """A row of kind sft."""

    input_ids: list[int]
    mask: list[bool]  # for each token; True: trained on


class PreferenceExample(NamedTuple):
    """A row of kind preference. The prompt is followed by the chosen or by the rejected answer."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None


class RankingExample(NamedTuple):
    """A row of kind ranking."""

    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]  # of each completion; 0 is best


class UnpairedExample(NamedTuple):
    """A row of kind unpaired."""

    prompt_ids: list[int]
    completion_ids: list[int]
    label: bool  # whether the completion is good
    unrelated: tuple[list[int], list[int]]  # the prompt again, and the completion of a row with another prompt


class PromptExample(NamedTuple):
    """A row of kind prompt."""

    prompt_ids: list[int]
    prompt: str  # the whole prompt as text (chat template applied), also where prompt_ids was truncated
    columns: Row  # the other columns of the row, for reward functions


class Encoded(NamedTuple):
    """Encoded rows."""

    examples: list  # of one of the classes above
    truncated: int  # rows that lost tokens


def encode_sft(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int) -> Encoded:
    """Rows of kind sft -> Encoded of SFTExample. In `messages` every assistant turn is trained on, up to its EOS.

    The prompt is everything before the first trained token. At most max_prompt_length tokens of the prompt are kept,
    and fewer where the row would pass max_length. Raises ValueError for a tokenizer without EOS, for a chat template
    that is missing or does not render a conversation as a continuation of its beginning; the other encoders do too.
    Raises ValueError also for a row without a trained token. The first token is never trained, as nothing predicts it.
    """
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    segments = []  # for each row its texts, untrained and trained in turn
    for n, row in enumerate(rows, 1):
        if row.get("messages") is not None:
            segments.append(_chat_segments(row["messages"], tokenizer, place(row, n)))
        else:
            prompt, (completion,) = _texts(row["prompt"], [row["completion"]], tokenizer, place(row, n))
            segments.append([prompt, completion])
    tokenized = iter(_tokenize(tokenizer, [text for texts in segments for text in texts]))
    examples, truncated = [], 0
    for n, (texts, row) in enumerate(zip(segments, rows, strict=True), 1):
        parts = [next(tokenized) for _ in texts]
        prompt = _start(bos, parts[0], _is_chat(row))
        rest = [token for part in parts[1:] for token in part]
        trained = [n % 2 == 0 for n, part in enumerate(parts[1:]) for _ in part]
        if (not rest or rest[-1] != eos) and _finished(row, "completion"):
            rest, trained = rest + [eos], trained + [True]
        prompt, (rest,), cut = _fit(prompt, [rest], tokenizer, max_length, max_prompt_length)
        mask = [False] * len(prompt) + trained[: len(rest)]
        if not any(mask[1:]):
            raise ValueError(f"{place(row, n)}: has nothing to train on: prompt and completion are empty")
        examples.append(SFTExample(prompt + rest, mask))
        truncated += cut
    return Encoded(examples, truncated)


def encode_preferences(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> Encoded:
    """Rows of kind preference -> Encoded of PreferenceExample. The prompt is cut to fit the longer answer."""
    examples, truncated = [], 0
    encoded = _encode_answers(
        rows,
        [[row["chosen"], row["rejected"]] for row in rows],
        tokenizer,
        max_length,
        max_prompt_length,
        finished=[[_finished(row, "chosen"), _finished(row, "rejected")] for row in rows],
    )
    for row, (prompt, (chosen, rejected), cut) in zip(rows, encoded, strict=True):
        margin = row.get("margin")
        examples.append(PreferenceExample(prompt, chosen, rejected, None if margin is None else float(margin)))
        truncated += cut
    return Encoded(examples, truncated)


def encode_rankings(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> Encoded:
    """Rows of kind ranking -> Encoded of RankingExample. The prompt is cut to fit the longest answer."""
    examples, truncated = [], 0
    encoded = _encode_answers(rows, [row["completions"] for row in rows], tokenizer, max_length, max_prompt_length)
    for row, (prompt, answers, cut) in zip(rows, encoded, strict=True):
        examples.append(RankingExample(prompt, answers, [int(rank) for rank in row["ranks"]]))
        truncated += cut
    return Encoded(examples, truncated)


def encode_unpaired(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> Encoded:
    """Rows of kind unpaired -> Encoded of UnpairedExample.

    The unrelated completion of a row is the completion of the next row with another prompt; after the last row comes
    the first. Raises ValueError where all rows have one prompt.
    """
    others = [rows[n] for n in _next_with_another_prompt(rows)]
    lengths = tokenizer, max_length, max_prompt_length
    own, unrelated = (
        _encode_answers(
            rows,
            [[row["completion"]] for row in answered],
            *lengths,
            finished=[[_finished(row, "completion")] for row in answered],
        )
        for answered in (rows, others)
    )
    examples, truncated = [], 0
    for row, (prompt, (ids,), cut), (other_prompt, (other_ids,), _) in zip(rows, own, unrelated, strict=True):
        examples.append(UnpairedExample(prompt, ids, row["label"], (other_prompt, other_ids)))
        truncated += cut
    return Encoded(examples, truncated)


def _next_with_another_prompt(rows: list[Row]) -> list[int]:
    """For every row the number of the next row, cyclically, with another prompt of the same form (text or messages)."""
    n, found = len(rows), [-1] * len(rows)
    for form in (True, False):
        own = [i for i in range(n) if isinstance(rows[i]["prompt"], str) is form]
        # backwards and twice around, because the last rows look at the first rows
        for place_in, i in reversed([*enumerate(own), *enumerate(own)]):
            following = own[(place_in + 1) % len(own)]
            found[i] = following if rows[following]["prompt"] != rows[i]["prompt"] else found[following]
    if -1 in found:
        where = place(rows[found.index(-1)], found.index(-1) + 1)
        raise ValueError(f"{where}: prompt: expected rows with at least two different prompts, found one prompt alone")
    return found


def encode_prompts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Encoded:
    """Rows of kind prompt -> Encoded of PromptExample. Raises ValueError for a prompt without a single token."""
    texts = [_texts(row["prompt"], [], tokenizer, place(row, n))[0] for n, row in enumerate(rows, 1)]
    bos = _bos(tokenizer)
    examples, truncated = [], 0
    for n, (row, text, ids) in enumerate(zip(rows, texts, _tokenize(tokenizer, texts), strict=True), 1):
        ids = _nonempty(_start(bos, ids, _is_chat(row)), place(row, n))
        kept = _cut_left(ids, max_prompt_length, tokenizer)
        columns = {name: value for name, value in row.items() if name != "prompt"}
        examples.append(PromptExample(kept, text, columns))
        truncated += len(kept) < len(ids)
    return Encoded(examples, truncated)


def encode_texts(
    prompts: list[str] | list[list[int]],
    completions: list[str],
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of every text, as training encodes them.

    prompts: the `prompt` of every `PromptExample`, or its `prompt_ids` where this tokenizer has made them.
    ended: whether EOS follows each completion.
    """
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    if prompts and isinstance(prompts[0], str):
        prompt_ids = [_start(bos, ids) for ids in _tokenize(tokenizer, cast(list[str], prompts))]
    else:
        prompt_ids = cast(list[list[int]], prompts)
    encoded = []
    for prompt, answer, end in zip(prompt_ids, _tokenize(tokenizer, completions), ended, strict=True):
        answer = answer + [eos] if end and answer[-1:] != [eos] else answer
        prompt, (answer,), _ = _fit(prompt, [answer], tokenizer, max_length, max_prompt_length)
        encoded.append((prompt, answer))
    return encoded


def _encode_answers(
    rows: list[Row],
    answers: list[list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    finished: list[list[bool]] | None = None,
) -> Iterator[tuple[list[int], list[list[int]], bool]]:
    """Yields for each row its prompt's ids, the ids of every answer, and whether anything was cut.

    finished: for each answer whether it ends in EOS; default: all.
    """
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    texts = [
        _texts(row["prompt"], completions, tokenizer, place(row, n))
        for n, (row, completions) in enumerate(zip(rows, answers, strict=True), 1)
    ]
    tokenized = iter(_tokenize(tokenizer, [text for prompt, completions in texts for text in [prompt, *completions]]))
    for n, (row, (_, completions)) in enumerate(zip(rows, texts, strict=True), 1):
        prompt = _nonempty(_start(bos, next(tokenized), _is_chat(row)), place(row, n))
        ids = [next(tokenized) for _ in completions]
        ends = [True] * len(ids) if finished is None else finished[n - 1]
        ids = [_ended(answer, eos, end) for answer, end in zip(ids, ends, strict=True)]
        yield _fit(prompt, ids, tokenizer, max_length, max_prompt_length)


def _finished(row: Row, column: str) -> bool:
    """Whether the text in `column` ends, or a length limit cut it off."""
    return row.get(f"{column}_finished") is not False


def _ended(answer: list[int], eos: int, finished: bool) -> list[int]:
    """The answer with one EOS behind it, or with none where it is not finished and has other tokens."""
    text = answer[:-1] if answer[-1:] == [eos] else answer
    return [*text, eos] if finished or not text else text


def _texts(
    prompt: str | list[Row], completions: list[str | list[Row]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[str]]:
    """Prompt and completions as text. In a conversation a completion is the assistant turn by the chat template."""
    if isinstance(prompt, str):
        return prompt, list(cast(list[str], completions))  # `rows` has checked them
    head = _render(prompt, tokenizer, where, add_generation_prompt=True)
    tails = []
    for completion in completions:
        turn = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole = _render(prompt + turn, tokenizer, where)
        tails.append(_after(head, whole, where).rstrip())
    return head, tails


def _chat_segments(messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """Cuts a rendered conversation into [untrained, assistant turn, untrained, assistant turn, ...].

    The borders of a turn are found by rendering beginnings of the conversation: the messages before the turn with the
    generation prompt, and the messages up to the turn without it. White space that the template writes behind a turn's
    EOS is not trained on.
    """
    whole = _render(messages, tokenizer, where)
    segments, end = [], 0
    for n, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        head = _render(messages[:n], tokenizer, where, add_generation_prompt=True)
        turn = _render(messages[: n + 1], tokenizer, where).rstrip()
        _after(turn, whole, where)
        segments += [head[end:], _after(head, turn, where)]
        end = len(turn)
    return segments


def _after(head: str, whole: str, where: str) -> str:
    if not whole.startswith(head):
        raise ValueError(
            f"{where}: the tokenizer's chat template writes a conversation differently once it goes on, so the trained "
            f"tokens cannot be told apart: expected {whole!r} to start with {head!r}"
        )
    return whole[len(head) :]


def _render(
    messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str, *, add_generation_prompt: bool = False
) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template")
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error
    return cast(str, text)  # token ids only with tokenize=True


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts BOS in front of a text by itself, else []."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _is_chat(row: Row) -> bool:
    """Whether a chat template writes the row's text."""
    return row.get("messages") is not None or not isinstance(row["prompt"], str)


def _start(bos: list[int], ids: list[int], chat: bool = False) -> list[int]:
    """Puts BOS in front, unless a chat template or the text has put it there."""
    return ids if chat or ids[: len(bos)] == bos else bos + ids


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> tuple[list[int], list[list[int]], bool]:
    """Cuts the prompt on the left, to one token at least, and then the completions on the right."""
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    longest = max(len(completion) for completion in completions)
    kept = _cut_left(prompt, min(max_prompt_length, max(1, max_length - longest)), tokenizer)
    cut = [completion[: max_length - len(kept)] for completion in completions]
    return kept, cut, kept != prompt or cut != completions


def _cut_left(ids: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if length < 1:
        raise ValueError(f"max_prompt_length: expected at least 1, got {length}")
    if len(ids) <= length:
        return ids
    if ids[0] == tokenizer.bos_token_id and length > 1:  # BOS stays, because models are trained with BOS in front
        return ids[:1] + ids[-(length - 1) :]
    return ids[-length:]


def _nonempty(prompt: list[int], where: str) -> list[int]:
    if not prompt:
        raise ValueError(f"{where}: prompt: has no tokens; the first token of an answer needs one to follow")
    return prompt


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no EOS token; completions have to end in one")
    return tokenizer.eos_token_id  # pyright: ignore[reportReturnType]


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: pad, else EOS, else 0. The id has no meaning, because the masks say what is padding."""
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in ids if token is not None), 0)  # pyright: ignore[reportReturnType]


def pad_left(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] int64 and mask [B, L] bool, L the longest length; every sequence ends in the last column."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)


def pad_right(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [B, L] int64 and mask [B, L] bool, L the longest length; every sequence starts in column 0."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], dtype=torch.int64)
    mask = torch.arange(max(map(len, sequences), default=0)) < lengths[:, None]
    ids = torch.full(mask.shape, pad_id, dtype=torch.int64)
    ids[mask] = torch.tensor(list(itertools.chain.from_iterable(sequences)), dtype=torch.int64)
    return ids, mask


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True) -> list[list[int]]:
    """Shuffles range(n) by (seed, epoch) and cuts it into batches. drop_last leaves out a short batch at the end.

    Raises ValueError unless 1 <= batch_size <= n.
    """
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size: expected between 1 and the {n} rows there are, got {batch_size}")
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches
