"""Rows in, token ids out: reading, checking and encoding the five kinds of training data.

`load_rows` reads JSON lines (plain or gzip), Parquet, a saved `datasets` directory or an in-memory list and checks
every row; the `encode_*` functions turn rows into token ids; `pad_left` / `pad_right` make batches.

Rules of the encoding:
- Prompt and completion are tokenized apart and joined, so no token straddles the border; BOS comes once, at the start,
  if the tokenizer adds one; every completion ends in EOS.
- Only completion tokens and their EOS are trained on. Masks are explicit, never derived from token ids, so pad == eos
  and a tokenizer without a pad token change nothing.
- Conversations (a `messages` column, or a prompt that is a list of messages) go through the tokenizer's chat template.
- A row that is too long loses the left of its prompt; a completion that is too long by itself loses its right end (and
  with it the EOS: the text does not end there). Both are counted in `Encoded.truncated`.

Left out: packing, streaming, and reading from the network.
"""

import gzip
import json
import math
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
KINDS = ("sft", "preference", "ranking", "prompt")


class SFTExample(NamedTuple):
    input_ids: list[int]
    mask: list[bool]  # True: trained on


class PreferenceExample(NamedTuple):
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float | None


class RankingExample(NamedTuple):
    prompt_ids: list[int]
    completion_ids: list[list[int]]
    ranks: list[int]  # 0 is best


class PromptExample(NamedTuple):
    prompt_ids: list[int]
    prompt: str  # the whole prompt as text (chat template applied), also where prompt_ids was truncated
    columns: Row  # the other columns of the row, for reward functions


class Encoded(NamedTuple):
    examples: list
    truncated: int  # rows that lost tokens


# ---------------------------------------------------------------------------------------------------- reading


def load_rows(source: str | Path | Iterable[Row], kind: str) -> list[Row]:
    """Reads and checks rows.

    source: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a directory written by `datasets.Dataset.save_to_disk`, or any
        iterable of dicts (a list, a `datasets.Dataset`).
    kind and its columns (others are kept):
        sft         prompt + completion, or messages
        preference  prompt + chosen + rejected (+ margin, a finite number)
        ranking     prompt + completions + ranks (integers, 0 is best, at least two different ones)
        prompt      prompt
      A prompt is a string or a list of messages ({"role", "content"}) that does not end in an assistant turn; after
      such a prompt a completion is a string or a list holding one assistant message, otherwise it is a string.

    Raises ValueError naming the file, the line (the row, where there are no lines; both from 1) and what is missing or
    of the wrong type; FileNotFoundError if there is no such path.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rows = []
    for where, row in _read(source):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named columns, got {_type(row)}")
        _check_row(row, kind, where)
        rows.append(dict(row))
    if not rows:
        raise ValueError(f"{source if isinstance(source, (str, Path)) else 'rows'}: no rows")
    return rows


def _read(source: str | Path | Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """Yields (where it stands, row)."""
    if not isinstance(source, (str, Path)):
        yield from ((f"row {n}", row) for n, row in enumerate(source, 1))
        return
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir():
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(_read_datasets(path), 1))
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        yield from _read_json_lines(path)
    elif path.suffix == ".parquet":
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(path)
        except pyarrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file: {error}") from error
        yield from ((f"{path}, row {n}", row) for n, row in enumerate(table.to_pylist(), 1))
    else:
        raise ValueError(f"{path}: expected .jsonl, .jsonl.gz, .parquet or a `datasets` directory")


def _read_datasets(path: Path) -> Iterable[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not a directory written by `datasets.Dataset.save_to_disk`") from error
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{path}: holds the splits {', '.join(dataset)}; give the directory of one, {path}/<split>")
    return dataset


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip file: {error}") from error


# ---------------------------------------------------------------------------------------------------- checking


def _check_row(row: Row, kind: str, where: str) -> None:
    if kind == "sft" and row.get("messages") is not None:
        _check_messages(row["messages"], f"{where}: messages")
        if not any(message["role"] == "assistant" for message in row["messages"]):
            raise ValueError(f"{where}: messages: no assistant turn to train on")
        return
    completions = {
        "sft": ["completion"],
        "preference": ["chosen", "rejected"],
        "ranking": ["completions", "ranks"],
        "prompt": [],
    }[kind]
    missing = [name for name in ["prompt", *completions] if row.get(name) is None]
    if missing:
        columns = ", ".join(["prompt", *completions]) + (" (or messages)" if kind == "sft" else "")
        raise ValueError(f"{where}: missing {', '.join(missing)}; a row of kind {kind} needs {columns}")
    chat = not isinstance(row["prompt"], str)
    if chat:
        _check_messages(row["prompt"], f"{where}: prompt")
        if row["prompt"][-1]["role"] == "assistant":
            raise ValueError(f"{where}: prompt: ends in an assistant turn, which belongs to the completion")
    if kind == "ranking":
        _check_ranking(row, chat, where)
        return
    for name in completions:
        _check_completion(row[name], chat, f"{where}: {name}")
    if kind == "preference" and row.get("margin") is not None:
        margin = row["margin"]
        if isinstance(margin, bool) or not isinstance(margin, Real) or not math.isfinite(margin):
            raise ValueError(f"{where}: margin: expected a finite number, got {margin!r}")


def _check_ranking(row: Row, chat: bool, where: str) -> None:
    completions, ranks = row["completions"], row["ranks"]
    for name in ("completions", "ranks"):
        if not isinstance(row[name], list):
            raise ValueError(f"{where}: {name}: expected a list, got {_type(row[name])}")
    for n, completion in enumerate(completions):
        _check_completion(completion, chat, f"{where}: completions[{n}]")
    if len(ranks) != len(completions):
        raise ValueError(f"{where}: ranks: {len(ranks)} ranks for {len(completions)} completions")
    if any(isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 0 for rank in ranks):
        raise ValueError(f"{where}: ranks: expected integers from 0 (the best), got {ranks!r}")
    if len(set(ranks)) < 2:
        raise ValueError(f"{where}: ranks: expected at least two different ranks, got {ranks!r}")


def _check_completion(completion: Any, chat: bool, where: str) -> None:
    if isinstance(completion, str):
        return
    if not chat:
        raise ValueError(f"{where}: expected a string, got {_type(completion)}")
    _check_messages(completion, where)
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in completion)
        raise ValueError(f"{where}: expected one assistant message, got the roles {roles}")


def _check_messages(messages: Any, where: str) -> None:
    if not isinstance(messages, list) or not messages:
        got = "an empty list" if isinstance(messages, list) else _type(messages)
        raise ValueError(f"{where}: expected a string or a list of messages, got {got}")
    for n, message in enumerate(messages):
        if not isinstance(message, dict):
            raise ValueError(f"{where}[{n}]: expected an object with role and content, got {_type(message)}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f"{where}[{n}]: {key}: expected a string, got {_type(message.get(key))}")


def _type(value: Any) -> str:
    return "nothing" if value is None else type(value).__name__


# ---------------------------------------------------------------------------------------------------- encoding


def encode_sft(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int) -> Encoded:
    """Rows of kind sft -> Encoded of SFTExample. Of `messages` every assistant turn is trained on, up to its EOS.

    The prompt is what stands before the first trained token: at most max_prompt_length tokens of it are kept, and fewer
    where the row would pass max_length. Raises ValueError (also below) for a tokenizer without EOS, and for a chat
    template that is missing or does not render a conversation as a continuation of its beginning.
    """
    eos = _eos(tokenizer)
    segments = []  # per row: texts, untrained and trained in turn
    for n, row in enumerate(rows, 1):
        if row.get("messages") is not None:
            segments.append(_chat_segments(row["messages"], tokenizer, f"row {n}"))
        else:
            prompt, (completion,) = _texts(row["prompt"], [row["completion"]], tokenizer, f"row {n}")
            segments.append([prompt, completion])
    tokenized = iter(_tokenize(tokenizer, [text for texts in segments for text in texts]))
    examples, truncated = [], 0
    for texts, row in zip(segments, rows, strict=True):
        parts = [next(tokenized) for _ in texts]
        prompt = _with_bos(parts[0], tokenizer, row)
        rest = [token for part in parts[1:] for token in part]
        trained = [n % 2 == 0 for n, part in enumerate(parts[1:]) for _ in part]
        if not rest or rest[-1] != eos:
            rest, trained = rest + [eos], trained + [True]
        prompt, (rest,), cut = _fit(prompt, [rest], tokenizer, max_length, max_prompt_length)
        examples.append(SFTExample(prompt + rest, [False] * len(prompt) + trained[: len(rest)]))
        truncated += cut
    return Encoded(examples, truncated)


def encode_preferences(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> Encoded:
    """Rows of kind preference -> Encoded of PreferenceExample. The prompt both share is cut for the longer one."""
    examples, truncated = [], 0
    encoded = _encode_answers(
        rows, [[row["chosen"], row["rejected"]] for row in rows], tokenizer, max_length, max_prompt_length
    )
    for row, (prompt, (chosen, rejected), cut) in zip(rows, encoded, strict=True):
        margin = row.get("margin")
        examples.append(PreferenceExample(prompt, chosen, rejected, None if margin is None else float(margin)))
        truncated += cut
    return Encoded(examples, truncated)


def encode_rankings(
    rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, max_prompt_length: int
) -> Encoded:
    """Rows of kind ranking -> Encoded of RankingExample. The prompt all share is cut for the longest answer."""
    examples, truncated = [], 0
    encoded = _encode_answers(rows, [row["completions"] for row in rows], tokenizer, max_length, max_prompt_length)
    for row, (prompt, answers, cut) in zip(rows, encoded, strict=True):
        examples.append(RankingExample(prompt, answers, [int(rank) for rank in row["ranks"]]))
        truncated += cut
    return Encoded(examples, truncated)


def encode_prompts(rows: list[Row], tokenizer: PreTrainedTokenizerBase, max_prompt_length: int) -> Encoded:
    """Rows of kind prompt -> Encoded of PromptExample. Raises ValueError for a prompt without a single token."""
    texts = [_texts(row["prompt"], [], tokenizer, f"row {n}")[0] for n, row in enumerate(rows, 1)]
    examples, truncated = [], 0
    for n, (row, text, ids) in enumerate(zip(rows, texts, _tokenize(tokenizer, texts), strict=True), 1):
        ids = _nonempty(_with_bos(ids, tokenizer, row), n)
        kept = _cut_left(ids, max_prompt_length, tokenizer)
        columns = {name: value for name, value in row.items() if name != "prompt"}
        examples.append(PromptExample(kept, text, columns))
        truncated += len(kept) < len(ids)
    return Encoded(examples, truncated)


def _encode_answers(
    rows: list[Row],
    answers: list[list[Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> Iterator[tuple[list[int], list[list[int]], bool]]:
    """Yields (prompt ids, ids of every answer with EOS, whether anything was cut) per row."""
    eos = _eos(tokenizer)
    texts = [
        _texts(row["prompt"], completions, tokenizer, f"row {n}")
        for n, (row, completions) in enumerate(zip(rows, answers, strict=True), 1)
    ]
    tokenized = iter(_tokenize(tokenizer, [text for prompt, completions in texts for text in [prompt, *completions]]))
    for n, (row, (_, completions)) in enumerate(zip(rows, texts, strict=True), 1):
        prompt = _nonempty(_with_bos(next(tokenized), tokenizer, row), n)
        ids = [next(tokenized) for _ in completions]
        ids = [answer if answer and answer[-1] == eos else answer + [eos] for answer in ids]
        yield _fit(prompt, ids, tokenizer, max_length, max_prompt_length)


def _texts(
    prompt: str | list[Row], completions: list[str | list[Row]], tokenizer: PreTrainedTokenizerBase, where: str
) -> tuple[str, list[str]]:
    """Prompt and completions as text; of a conversation, the assistant turn as the chat template writes it."""
    if isinstance(prompt, str):
        return prompt, list(completions)
    head = _render(prompt, tokenizer, where, add_generation_prompt=True)
    tails = []
    for completion in completions:
        turn = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        whole = _render(prompt + turn, tokenizer, where)
        tails.append(_after(head, whole, where).rstrip())
    return head, tails


def _chat_segments(messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str) -> list[str]:
    """Cuts a rendered conversation into [untrained, assistant turn, untrained, assistant turn, ...].

    Where a turn begins and ends is found by rendering the conversation's beginnings: with the generation prompt before
    the turn, without it after. White space that the template writes behind a turn's EOS is not trained on.
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


def _render(messages: list[Row], tokenizer: PreTrainedTokenizerBase, where: str, **options: bool) -> str:
    if tokenizer.chat_template is None:
        raise ValueError(f"{where}: has messages, but the tokenizer has no chat template")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from error


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _with_bos(ids: list[int], tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """Adds BOS where the tokenizer does by itself; a chat template writes its own."""
    bos = tokenizer.bos_token_id
    added = tokenizer("")["input_ids"][:1]
    chat = row.get("messages") is not None or not isinstance(row["prompt"], str)
    return ids if chat or bos is None or added != [bos] or ids[:1] == [bos] else [bos, *ids]


def _fit(
    prompt: list[int],
    completions: list[list[int]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    max_prompt_length: int,
) -> tuple[list[int], list[list[int]], bool]:
    """Cuts the prompt on the left, down to one token if need be, and then the completions on the right."""
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
    if ids[0] == tokenizer.bos_token_id and length > 1:  # models are trained with BOS in front; keep it there
        return ids[:1] + ids[-(length - 1) :]
    return ids[-length:]


def _nonempty(prompt: list[int], n: int) -> list[int]:
    if not prompt:
        raise ValueError(f"row {n}: prompt: has no tokens; the first token of an answer needs one to follow")
    return prompt


def _eos(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError("tokenizer: has no EOS token; completions have to end in one")
    return tokenizer.eos_token_id


# ---------------------------------------------------------------------------------------------------- batching


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to fill with: pad, else EOS, else 0. It carries no meaning; the masks do."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def pad_left(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids[B, L] int64, mask[B, L] bool), L the longest; every sequence ends in the last column."""
    ids, mask = pad_right([sequence[::-1] for sequence in sequences], pad_id)
    return ids.flip(1), mask.flip(1)


def pad_right(sequences: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-> (ids[B, L] int64, mask[B, L] bool), L the longest; every sequence starts in column 0."""
    length = max(map(len, sequences), default=0)
    ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    mask = torch.zeros((len(sequences), length), dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.int64)
        mask[row, : len(sequence)] = True
    return ids, mask


def epoch_batches(n: int, batch_size: int, seed: int, epoch: int, drop_last: bool = True) -> list[list[int]]:
    """Shuffles range(n) by (seed, epoch) and cuts it into batches; drop_last leaves out the short one at the end."""
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size: expected between 1 and the {n} rows there are, got {batch_size}")
    order = np.random.default_rng([seed, epoch]).permutation(n).tolist()
    batches = [order[start : start + batch_size] for start in range(0, n, batch_size)]
    return batches[:-1] if drop_last and len(batches[-1]) < batch_size else batches
