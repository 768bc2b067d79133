"""Rows in, token ids out: encoding every kind of training data.

- Prompt and completion are tokenized apart and joined, so no token stands on both sides of the border. If the tokenizer
  adds BOS, it comes once, at the start. Every finished completion ends in EOS.
- A completion that a length limit cut off has no end, so no EOS follows it. Its row says so by `chosen_finished`,
  `rejected_finished` or `completion_finished`: false. `pairs` writes these columns.
- Only completion tokens and their EOS are trained on. Masks are explicit and never derived from token ids, so pad ==
  eos and a tokenizer without a pad token change nothing.
- Conversations (a `messages` column, or a prompt that is a list of messages) go through the tokenizer's chat template,
  with the row's `tools` and `chat_template_kwargs`.
- A prompt longer than max_prompt_length loses its left end. A row longer than max_length loses the right end of its
  completion, EOS with it, because the text does not end there. The prompt is kept, because a completion behind a part
  of its prompt teaches nothing. `Encoded` counts both.

Left out: packing several rows into one sequence.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import TemplateOptions, options_of, prompt_of, write_prompt, write_turns
from rlhf_fast.data.padding import epoch_batches, pad_id, pad_left, pad_right
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
    cut_prompts: int  # rows that lost the left end of their prompt
    cut_answers: int  # rows that lost the right end of an answer


class _Cut(NamedTuple):
    """What a row lost."""

    prompt: bool
    answer: bool


def _encoded(examples: list, cuts: list[_Cut]) -> Encoded:
    return Encoded(examples, sum(map(any, cuts)), sum(cut.prompt for cut in cuts), sum(cut.answer for cut in cuts))


def encode_sft(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind sft -> Encoded of SFTExample. In `messages` every assistant turn is trained on, up to its EOS.

    The prompt is everything before the first trained token. At most max_prompt_length tokens of the prompt are kept,
    and at least one token is left for the answer. chat_template_kwargs: options of the chat template; a row's own
    options win. Raises ValueError for a tokenizer without EOS, for a chat template
    that is missing or does not render a conversation as a continuation of its beginning; the other encoders do too.
    Raises ValueError also for a row without a trained token. The first token is never trained, as nothing predicts it.
    """
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    segments = []  # for each row its texts, untrained and trained in turn
    for n, row in enumerate(rows, 1):
        options = options_of(row, chat_template_kwargs)
        if row.get("messages") is not None:
            segments.append(write_turns(row["messages"], tokenizer, place(row, n), options))
        else:
            text = prompt_of(row, tokenizer)
            prompt, (completion,) = write_prompt(text, [row["completion"]], tokenizer, place(row, n), options)
            segments.append([prompt, completion])
    tokenized = iter(_tokenize(tokenizer, [text for texts in segments for text in texts]))
    examples, cuts = [], []
    for n, (texts, row) in enumerate(zip(segments, rows, strict=True), 1):
        parts = [next(tokenized) for _ in texts]
        chat = row.get("messages") is not None or _is_chat(row, tokenizer)
        prompt = _start(bos, parts[0], chat)
        rest = [token for part in parts[1:] for token in part]
        trained = [n % 2 == 0 for n, part in enumerate(parts[1:]) for _ in part]
        if (not rest or rest[-1] != eos) and _finished(row, "completion"):
            rest, trained = rest + [eos], trained + [True]
        prompt, (rest,), cut = _fit(prompt, [rest], tokenizer, max_length, max_prompt_length)
        mask = [False] * len(prompt) + trained[: len(rest)]
        if not any(mask[1:]):
            raise ValueError(f"{place(row, n)}: has nothing to train on: prompt and completion are empty")
        examples.append(SFTExample(prompt + rest, mask))
        cuts.append(cut)
    return _encoded(examples, cuts)


def encode_preferences(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind preference -> Encoded of PreferenceExample. Each answer is cut by itself."""
    examples, cuts = [], []
    answers = [[row["chosen"], row["rejected"]] for row in rows]
    finished = [[_finished(row, "chosen"), _finished(row, "rejected")] for row in rows]
    options = tokenizer, max_length, max_prompt_length, chat_template_kwargs
    encoded = _encode_answers(rows, answers, *options, finished=finished)
    for row, (prompt, (chosen, rejected), cut) in zip(rows, encoded, strict=True):
        margin = row.get("margin")
        examples.append(PreferenceExample(prompt, chosen, rejected, None if margin is None else float(margin)))
        cuts.append(cut)
    return _encoded(examples, cuts)


def encode_rankings(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind ranking -> Encoded of RankingExample. Each answer is cut by itself."""
    examples, cuts = [], []
    answers = [row["completions"] for row in rows]
    encoded = _encode_answers(rows, answers, tokenizer, max_length, max_prompt_length, chat_template_kwargs)
    for row, (prompt, answers, cut) in zip(rows, encoded, strict=True):
        examples.append(RankingExample(prompt, answers, [int(rank) for rank in row["ranks"]]))
        cuts.append(cut)
    return _encoded(examples, cuts)


def encode_unpaired(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind unpaired -> Encoded of UnpairedExample.

    The unrelated completion of a row is the completion of the next row with another prompt; after the last row comes
    the first. Raises ValueError where all rows have one prompt.
    """
    others = [rows[n] for n in _next_with_another_prompt(rows)]
    options = tokenizer, max_length, max_prompt_length, chat_template_kwargs
    own, unrelated = (
        _encode_answers(
            rows,
            [[row["completion"]] for row in answered],
            *options,
            finished=[[_finished(row, "completion")] for row in answered],
        )
        for answered in (rows, others)
    )
    examples, cuts = [], []
    for row, (prompt, (ids,), cut), (other_prompt, (other_ids,), _) in zip(rows, own, unrelated, strict=True):
        examples.append(UnpairedExample(prompt, ids, row["label"], (other_prompt, other_ids)))
        cuts.append(cut)
    return _encoded(examples, cuts)


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


def encode_prompts(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind prompt -> Encoded of PromptExample. Raises ValueError for a prompt without a single token."""
    texts = []
    for n, row in enumerate(rows, 1):
        options = options_of(row, chat_template_kwargs)
        texts.append(write_prompt(prompt_of(row, tokenizer), [], tokenizer, place(row, n), options)[0])
    bos = _bos(tokenizer)
    examples, cuts = [], []
    for n, (row, text, ids) in enumerate(zip(rows, texts, _tokenize(tokenizer, texts), strict=True), 1):
        ids = _nonempty(_start(bos, ids, _is_chat(row, tokenizer)), place(row, n))
        kept = _cut_left(ids, max_prompt_length, tokenizer)
        columns = {name: value for name, value in row.items() if name != "prompt"}
        examples.append(PromptExample(kept, text, columns))
        cuts.append(_Cut(len(kept) < len(ids), False))
    return _encoded(examples, cuts)


def encode_texts(
    prompts: list[str] | list[list[int]],
    completions: list[str],
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of every text, as training encodes them, for a model that scores the completions.

    A prompt gives way to a long completion, unlike in training, because the completion is what is scored.

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
        room = max(1, max_length - len(answer))
        prompt, (answer,), _ = _fit(prompt, [answer], tokenizer, max_length, min(max_prompt_length, room))
        encoded.append((prompt, answer))
    return encoded


def _encode_answers(
    rows: list[Row],
    answers: list[list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions,
    finished: list[list[bool]] | None = None,
) -> Iterator[tuple[list[int], list[list[int]], _Cut]]:
    """Yields for each row its prompt's ids, the ids of every answer, and what was cut.

    finished: for each answer whether it ends in EOS; default: all.
    """
    bos, eos = _bos(tokenizer), _eos(tokenizer)
    texts = []
    for n, (row, completions) in enumerate(zip(rows, answers, strict=True), 1):
        options = options_of(row, chat_template_kwargs)
        texts.append(write_prompt(prompt_of(row, tokenizer), completions, tokenizer, place(row, n), options))
    tokenized = iter(_tokenize(tokenizer, [text for prompt, completions in texts for text in [prompt, *completions]]))
    for n, (row, (_, completions)) in enumerate(zip(rows, texts, strict=True), 1):
        prompt = _nonempty(_start(bos, next(tokenized), _is_chat(row, tokenizer)), place(row, n))
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


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts BOS in front of a text by itself, else []."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _is_chat(row: Row, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a chat template writes the row's prompt."""
    return not isinstance(prompt_of(row, tokenizer), str)


def _start(bos: list[int], ids: list[int], chat: bool = False) -> list[int]:
    """Puts BOS in front, unless a chat template or the text has put it there."""
    return ids if chat or ids[: len(bos)] == bos else bos + ids


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> tuple[list[int], list[list[int]], _Cut]:
    """Cuts the prompt on the left, so that max_length leaves a token for an answer, and the answers on the right."""
    if max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    kept = _cut_left(prompt, min(max_prompt_length, max_length - 1), tokenizer)
    cut = [completion[: max_length - len(kept)] for completion in completions]
    return kept, cut, _Cut(kept != prompt, cut != completions)


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
