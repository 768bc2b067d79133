"""Rows in, token ids out: encoding every kind of training data.

- Prompt and completion are one text, and are tokenized as one: `seams` finds the border. If the tokenizer adds BOS, it
  comes once, at the start. Every finished completion ends in the one end of `turns`.
- A completion that a length limit cut off has no end. Its row says so by `chosen_finished`, `rejected_finished` or
  `completion_finished`: false. `pairs` writes these columns.
- Only completion tokens and their end are trained on. Masks are explicit and never derived from token ids, so pad ==
  eos and a tokenizer without a pad token change nothing.
- Conversations (a `messages` column, or a prompt that is a list of messages) go through the tokenizer's chat template,
  with the row's `tools` and `chat_template_kwargs`.
- A prompt longer than max_prompt_length loses its left end. A row longer than max_length loses the right end of its
  completion, its end with it, because the text does not end there. The prompt is kept, because a completion behind a
  part of its prompt teaches nothing. `Encoded` counts both.

Left out: packing several rows into one sequence.
"""

from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.answers import continuations, encode_texts, fit, fit_answer, tokenized, with_end
from rlhf_fast.data.chat import Prompt, TemplateOptions, Text, options_of, prompt_of, write_prompt, write_turns
from rlhf_fast.data.examples import (
    Cut,
    Encoded,
    PreferenceExample,
    PromptExample,
    RankingExample,
    SFTExample,
    UnpairedExample,
)
from rlhf_fast.data.padding import epoch_batches, pad_id, pad_left, pad_right
from rlhf_fast.data.rows import Row, load_rows, place
from rlhf_fast.data.seams import tokenize
from rlhf_fast.data.turns import turns_of

__all__ = [
    "Cut",
    "Encoded",
    "PreferenceExample",
    "PromptExample",
    "RankingExample",
    "SFTExample",
    "UnpairedExample",
    "continuations",
    "encode_answers",
    "encode_preferences",
    "encode_prompts",
    "encode_rankings",
    "encode_sft",
    "encode_texts",
    "encode_unpaired",
    "epoch_batches",
    "fit_answer",
    "is_finished",
    "load_rows",
    "pad_id",
    "pad_left",
    "pad_right",
]


def encode_sft(
    rows: list[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions = None,
) -> Encoded:
    """Rows of kind sft -> Encoded of SFTExample. In `messages` every assistant turn is trained on, up to its end.

    Where the chat template writes earlier turns otherwise, a conversation makes several examples, see `write_turns`.
    The prompt is everything before the first trained token. At most max_prompt_length tokens of the prompt are kept,
    and at least one token is left for the answer. chat_template_kwargs: options of the chat template; a row's own
    options win. Raises ValueError for a tokenizer without EOS, for a chat template that is missing, and for a template
    that writes the messages in front of an answer otherwise once the answer follows; the other encoders do too.
    Raises ValueError also for a row without a trained token. The first token is never trained, as nothing predicts it.
    """
    turns = turns_of(tokenizer)
    prompts: list[tuple[tuple[int, int], Prompt]] = []  # (number of a row, of its text), a prompt and its answer
    talks: list[tuple[tuple[int, int], Text]] = []  # (number of a row, of its text), several trained turns
    for n, row in enumerate(rows):
        where, options = place(row, n + 1), options_of(row, chat_template_kwargs)
        if row.get("messages") is None:
            asked, finished = prompt_of(row, tokenizer), [is_finished(row, "completion")]
            written = write_prompt(asked, [row["completion"]], finished, tokenizer, turns, where, options)
            prompts.append(((n, 0), written))
            continue
        for k, text in enumerate(write_turns(row["messages"], tokenizer, turns, where, options)):
            if len(text.spans) == 1:
                prompts.append(((n, k), Prompt(text.text[: text.spans[0][0]], [text], False)))
            else:
                talks.append(((n, k), text))
    encoded = tokenized([prompt for _, prompt in prompts], tokenizer)
    parts = [(n, ids, own, [True] * len(own)) for (n, _), (ids, (own,)) in zip(prompts, encoded, strict=True)]
    whole = tokenize(tokenizer, [text.text for _, text in talks], [text.spans for _, text in talks])
    for (n, text), (ids, spans, _) in zip(talks, whole, strict=True):
        first = spans[0][0]
        rest = with_end(ids[first:], text.end, turns.eos)
        trained = [False] * len(rest)
        for begin, stop in [*spans, (len(ids), first + len(rest))]:
            trained[begin - first : stop - first] = [True] * (stop - begin)
        parts.append((n, ids[:first], rest, trained))
    examples, cuts = [], []
    for (n, _), prompt, rest, trained in sorted(parts, key=lambda part: part[0]):
        prompt, (rest,), cut = fit(n, prompt, [rest], tokenizer, max_length, max_prompt_length)
        mask = [False] * len(prompt) + trained[: len(rest)]
        if not any(mask[1:]):
            raise ValueError(f"{place(rows[n], n + 1)}: has nothing to train on: prompt and completion are empty")
        examples.append(SFTExample(prompt + rest, mask))
        cuts.append(cut)
    return Encoded(examples, cuts)


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
    finished = [[is_finished(row, "chosen"), is_finished(row, "rejected")] for row in rows]
    options = tokenizer, max_length, max_prompt_length, chat_template_kwargs
    encoded = encode_answers(rows, answers, *options, finished=finished)
    for row, (prompt, (chosen, rejected), cut, _) in zip(rows, encoded, strict=True):
        margin = row.get("margin")
        examples.append(PreferenceExample(prompt, chosen, rejected, None if margin is None else float(margin)))
        cuts.append(cut)
    return Encoded(examples, cuts)


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
    encoded = encode_answers(rows, answers, tokenizer, max_length, max_prompt_length, chat_template_kwargs)
    for row, (prompt, answers, cut, _) in zip(rows, encoded, strict=True):
        examples.append(RankingExample(prompt, answers, [int(rank) for rank in row["ranks"]]))
        cuts.append(cut)
    return Encoded(examples, cuts)


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
        encode_answers(
            rows,
            [[row["completion"]] for row in answered],
            *options,
            finished=[[is_finished(row, "completion")] for row in answered],
        )
        for answered in (rows, others)
    )
    examples, cuts = [], []
    for row, (prompt, (ids,), cut, _), (other_prompt, (other_ids,), *_) in zip(rows, own, unrelated, strict=True):
        examples.append(UnpairedExample(prompt, ids, row["label"], (other_prompt, other_ids)))
        cuts.append(cut)
    return Encoded(examples, cuts)


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
    encoded = encode_answers(rows, [[] for _ in rows], tokenizer, None, max_prompt_length, chat_template_kwargs)
    examples, cuts = [], []
    for row, (prompt, _, cut, text) in zip(rows, encoded, strict=True):
        columns = {name: value for name, value in row.items() if name != "prompt"}
        examples.append(PromptExample(prompt, text, columns))
        cuts.append(cut)
    return Encoded(examples, cuts)


def encode_answers(
    rows: list[Row],
    answers: list[list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int,
    chat_template_kwargs: TemplateOptions,
    finished: list[list[bool]] | None = None,
) -> Iterator[tuple[list[int], list[list[int]], Cut, str]]:
    """Yields for each row its prompt's ids, the ids of every answer, what was cut, and the prompt's whole text.

    max_length: None cuts no answer. finished: for each answer whether it ends; default: all.
    """
    turns, written = turns_of(tokenizer), []
    for n, (row, completions) in enumerate(zip(rows, answers, strict=True)):
        options, where = options_of(row, chat_template_kwargs), place(row, n + 1)
        ends = [True] * len(completions) if finished is None else finished[n]
        written.append(write_prompt(prompt_of(row, tokenizer), completions, ends, tokenizer, turns, where, options))
    for n, (text, (prompt, ids)) in enumerate(zip(written, tokenized(written, tokenizer), strict=True)):
        prompt = _nonempty(prompt, place(rows[n], n + 1))
        yield *fit(n, prompt, ids, tokenizer, max_length, max_prompt_length), text.text


def is_finished(row: Row, column: str) -> bool:
    """Whether the text in `column` ends, or a length limit cut it off."""
    return row.get(f"{column}_finished") is not False


def _nonempty(prompt: list[int], where: str) -> list[int]:
    if not prompt:
        raise ValueError(f"{where}: prompt: has no tokens; the first token of an answer needs one to follow")
    return prompt
