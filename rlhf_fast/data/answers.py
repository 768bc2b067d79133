"""Prompts with their answers as token ids, cut to length: what every kind of row and every scored text goes through."""

import sys
from collections.abc import Iterator, Sequence
from os.path import commonprefix

from transformers import PreTrainedTokenizerBase

from rlhf_fast.data.chat import Prompt, Text, write_text
from rlhf_fast.data.examples import Cut
from rlhf_fast.data.seams import split
from rlhf_fast.data.turns import turns_of


def tokenized(written: list[Prompt], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[list[int], list[list[int]]]]:
    """For each prompt its ids and those of every answer.

    All answers of a prompt stand behind the same ids: those that all their texts begin with, where a template opens
    answers in several ways.
    """
    bos, eos = _bos(tokenizer), turns_of(tokenizer).eos
    texts = [
        text for prompt in written for text in prompt.answers or [Text(prompt.text, [(len(prompt.text), 0)], None)]
    ]
    parts = iter(split(tokenizer, [text.text for text in texts], [text.spans[0][0] for text in texts]))
    for prompt in written:
        own = [next(parts) for _ in prompt.answers or [None]]
        border = len(commonprefix([ids[:length] for ids, length in own]))
        ids = _start(bos if prompt.bos else [], own[0][0][:border])
        answers = zip(prompt.answers, own, strict=False)
        yield ids, [with_end(whole[border:], text.end, eos) for text, (whole, _) in answers]


def with_end(answer: list[int], end: int | None, eos: int) -> list[int]:
    """The answer with its end. An answer without tokens gets one in any case."""
    return answer if end is None and answer else [*answer, eos if end is None else end]


def fit(
    row: int,
    prompt: list[int],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    max_prompt_length: int,
) -> tuple[list[int], list[list[int]], Cut]:
    """Cuts the prompt on the left, so that max_length leaves a token for an answer, and the answers on the right."""
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length: expected at least 2, got {max_length}")
    longest = max_prompt_length if max_length is None else min(max_prompt_length, max_length - 1)
    kept = _cut_left(prompt, longest, tokenizer)
    cut = [completion if max_length is None else completion[: max_length - len(kept)] for completion in completions]
    lost = tuple(len(whole) - len(part) for whole, part in zip(completions, cut, strict=True))
    return kept, cut, Cut(row, len(prompt) - len(kept), lost)


def encode_texts(
    prompts: list[str],
    completions: list[str],
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, completion ids) of every text, as training encodes them, for a model that scores the completions.

    prompts: the `prompt` of every `PromptExample`. ended: whether an end follows each completion. A prompt gives way to
    a long completion, unlike in training, because the completion is what is scored.
    """
    turns = turns_of(tokenizer)
    rows = zip(prompts, completions, ended, strict=True)
    written = [write_text(prompt, [completion], [end], turns) for prompt, completion, end in rows]
    pairs = [(prompt, answer) for prompt, (answer,) in tokenized(written, tokenizer)]
    return [fit_answer(*pair, tokenizer, max_length, max_prompt_length) for pair in pairs]


def fit_answer(
    prompt: list[int], answer: list[int], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> tuple[list[int], list[int]]:
    """Prompt and answer in max_length tokens. The prompt gives way to the answer."""
    room = max(1, max_length - len(answer))
    prompt, (answer,), _ = fit(0, prompt, [answer], tokenizer, max_length, min(max_prompt_length, room))
    return prompt, answer


def continuations(
    prompts: list[str],
    pairs: list[tuple[list[int], list[int]]],
    ended: Sequence[bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[str]:
    """The texts of sampled completions as they follow their prompts: tokenized behind them they give the ids again.

    A tokenizer of the SentencePiece family takes the space in front of a decoded text away. Decoded behind its prompt
    the completion keeps this space. Where neither text gives the ids, the text that gives more of them is taken.

    prompts: their texts. pairs: prompt and completion ids. ended: which completions have an end, which gets no text.
    """
    answers = [ids[:-1] if end else ids for (_, ids), end in zip(pairs, ended, strict=True)]
    alone: list[str] = tokenizer.batch_decode(answers, skip_special_tokens=True)  # pyright: ignore[reportAssignmentType]

    def shared(texts: list[str], rows: list[int]) -> list[int]:
        asked, ends = [prompts[n] for n in rows], [ended[n] for n in rows]
        encoded = encode_texts(asked, texts, ends, tokenizer, sys.maxsize, sys.maxsize)
        return [len(commonprefix([ids, pairs[n][1]])) for n, (_, ids) in zip(rows, encoded, strict=True)]

    alike = shared(alone, list(range(len(pairs))))
    others = [n for n, (length, (_, ids)) in enumerate(zip(alike, pairs, strict=True)) if length < len(ids)]
    behind = []
    for n in others:
        head = tokenizer.decode(pairs[n][0], skip_special_tokens=True)
        whole = tokenizer.decode(pairs[n][0] + answers[n], skip_special_tokens=True)
        behind.append(str(whole)[len(head) :] if str(whole).startswith(str(head)) else alone[n])
    texts = list(alone)
    for n, text, length in zip(others, behind, shared(behind, others), strict=True):
        texts[n] = text if length > alike[n] else texts[n]
    return texts


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] if the tokenizer puts BOS in front of a text by itself, else []."""
    return [token for token in tokenizer("")["input_ids"][:1] if token == tokenizer.bos_token_id]


def _start(bos: list[int], ids: list[int]) -> list[int]:
    """Puts BOS in front, unless the text has put it there."""
    return ids if ids[: len(bos)] == bos else bos + ids


def _cut_left(ids: list[int], length: int, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if length < 1:
        raise ValueError(f"max_prompt_length: expected at least 1, got {length}")
    if len(ids) <= length:
        return ids
    if ids[0] == tokenizer.bos_token_id and length > 1:  # BOS stays, because models are trained with BOS in front
        return ids[:1] + ids[-(length - 1) :]
    return ids[-length:]
