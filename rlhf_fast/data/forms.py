"""Rows of other data sets in the form that the encoders take.

    --columns                    prompt=question renames the column `question`
    CSV                          cells of columns that hold no text are read as JSON: margin, label, messages, ...
    ShareGPT                     conversations -> messages, or -> prompt where a row has answers of its own
    Alpaca                       instruction (+ input) -> prompt, output -> completion
    pairs of whole dialogues     what chosen and rejected both begin with -> prompt

A row in our own form passes unchanged.
"""

import json
from collections.abc import Mapping
from contextlib import suppress
from os.path import commonprefix
from typing import Any

from rlhf_fast.data.messages import read_messages, type_name
from rlhf_fast.data.readers import Cells, Record, Row

COLUMNS = {
    "sft": ("completion",),
    "preference": ("chosen", "rejected"),
    "ranking": ("completions", "ranks"),
    "unpaired": ("completion", "label"),
    "prompt": (),
}
"""Kind of rows -> the columns that a row has beside its prompt."""
_OPTIONS = ("tools", "chat_template_kwargs")
_NO_TEXT = ("messages", "conversations", "completions", "ranks", "label", "margin", *_OPTIONS)
_OBJECTS = ("messages", "prompt", "completion", "chosen", "rejected", "completions", "conversations", *_OPTIONS)
_LABELS = {"true": "true", "false": "false", "1": "true", "0": "false"}
_OURS = {"prompt", "messages", "margin", *_OPTIONS, *(name for names in COLUMNS.values() for name in names)}
_ANSWER = "\n\nAssistant:"  # begins an answer in HH-RLHF's dialogues

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


class Instruction(list):
    """An Alpaca prompt: one user message, which also knows its text for tokenizers without a chat template."""

    text: str

    def __init__(self, instruction: str, given: str) -> None:
        super().__init__([{"role": "user", "content": f"{instruction}\n{given}" if given else instruction}])
        self.text = (_ALPACA_WITH_INPUT if given else _ALPACA).format(instruction=instruction, input=given)


def renamed(row: Row, columns: Mapping[str, str], kind: str, where: str) -> Row:
    """The row under our names. columns: our name -> the name in the data.

    Raises ValueError where the row lacks a column. A column that only rows of other kinds need may be missing, because
    one mapping serves all data of a run: pairs to train on and prompts to evaluate on, for example.
    """
    foreign = _OURS - {"prompt", "messages", *COLUMNS[kind]}
    missing = [name for ours, name in columns.items() if name not in row and ours not in foreign]
    if missing:
        raise ValueError(f"{where}: columns: expected {', '.join(missing)}, got a row with {', '.join(map(str, row))}")
    taken = {ours: name for ours, name in columns.items() if name in row}
    rest = {name: value for name, value in row.items() if name not in taken.values()}
    return type(row)({**rest, **{ours: row[name] for ours, name in taken.items()}})


def in_our_form(row: Row, kind: str, where: str) -> Row:
    """The row with our columns, conversations as `read_messages` makes them. Raises ValueError, which `where` opens."""
    if isinstance(row, Cells):
        row = _parsed(row, where)
    elif isinstance(row, Record):
        row = {name: _without_nulls(value) if name in _OBJECTS else value for name, value in row.items()}
    row = dict(row)
    if row.get("prompt") is None and (kind != "sft" or row.get("messages") is None):
        if row.get("conversations") is not None:
            _from_sharegpt(row, kind, where)
        elif row.get("instruction") is not None:
            _from_alpaca(row, kind, where)
    if kind == "sft" and row.get("messages") is not None:
        row["messages"] = read_messages(row["messages"], f"{where}: messages")
    elif row.get("prompt") is not None and not isinstance(row["prompt"], str | Instruction):
        row["prompt"] = read_messages(row["prompt"], f"{where}: prompt")
    if kind == "preference":
        _split_dialogues(row, where)
    chat = not isinstance(row.get("prompt"), str) or (kind == "sft" and row.get("messages") is not None)
    if chat:
        for name in COLUMNS[kind]:
            if name == "completions" and isinstance(row.get(name), list):
                row[name] = [_read_answer(x, f"{where}: {name}[{n}]") for n, x in enumerate(row[name])]
            elif name in ("completion", "chosen", "rejected") and row.get(name) is not None:
                row[name] = _read_answer(row[name], f"{where}: {name}")
        for name in _OPTIONS:
            if row.get(name) is not None:
                row[name] = _read_option(row[name], name, where)
    return row


def _parsed(row: Row, where: str) -> Row:
    """A CSV row: JSON where a column holds no text. An empty cell of such a column is nothing."""
    values = dict(row)
    for name in _NO_TEXT:
        cell = values.get(name)
        if isinstance(cell, str):
            try:
                text = _LABELS.get(cell.strip().lower(), cell) if name == "label" else cell
                values[name] = json.loads(text) if text.strip() else None
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: {name}: expected JSON in this column, got {cell!r:.60}") from error
    return values


def _without_nulls(value: Any) -> Any:
    """The value without the keys that a typed table has added; the arguments of a call of a tool, for example."""
    if isinstance(value, dict):
        kept = {key: item for key, item in value.items() if item is not None or key == "content"}
        return {key: _without_nulls(item) for key, item in kept.items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _from_sharegpt(row: Row, kind: str, where: str) -> None:
    messages = read_messages(row.pop("conversations"), f"{where}: conversations")
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": row["system"]}, *messages]
    row["messages" if kind == "sft" and row.get("completion") is None else "prompt"] = messages


def _from_alpaca(row: Row, kind: str, where: str) -> None:
    instruction, given = row["instruction"], row.get("input") or ""
    for name, value in (("instruction", instruction), ("input", given)):
        if not isinstance(value, str):
            raise ValueError(f"{where}: {name}: expected a string, got {type_name(value)}")
    if row.get("history"):
        raise ValueError(f"{where}: history: expected none beside instruction; give such rows as messages")
    row["prompt"] = Instruction(instruction, given)
    if row.get("completion") is None and "output" in row and kind in ("sft", "unpaired", "prompt"):
        row["completion"] = row.pop("output")


def _read_answer(answer: Any, where: str) -> Any:
    """A text, or a message or several as a list of messages."""
    if isinstance(answer, str):
        return answer
    return read_messages([answer] if isinstance(answer, dict) else answer, where)


def _read_option(value: Any, name: str, where: str) -> Any:
    expected = list if name == "tools" else dict
    if isinstance(value, str):  # tables hold tools as JSON, because their keys differ from row to row
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if not isinstance(value, expected) or (name == "tools" and not all(isinstance(tool, dict) for tool in value)):
        kind = "a list of objects" if name == "tools" else "an object with named options"
        raise ValueError(f"{where}: {name}: expected {kind}, got {type_name(value)}")
    return value


# ------------------------------------------------------------------------------------------------ whole dialogues


def _split_dialogues(row: Row, where: str) -> None:
    """Takes the prompt out of chosen and rejected, where both hold whole dialogues."""
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        start = _border(chosen, rejected)
        if not start:
            raise ValueError(f"{where}: missing prompt, and chosen and rejected do not begin alike")
        row |= {"prompt": chosen[:start], "chosen": chosen[start:], "rejected": rejected[start:]}
    elif isinstance(chosen, list) and isinstance(rejected, list) and chosen and rejected:
        chosen, rejected = (read_messages(row[name], f"{where}: {name}") for name in ("chosen", "rejected"))
        if chosen[0]["role"] == "assistant" and rejected[0]["role"] == "assistant" and prompt is not None:
            return
        shared = _shared(chosen, rejected)
        said = [(message.get("content") or "").strip() for message in chosen[:shared]]
        if not shared:
            raise ValueError(f"{where}: missing prompt, and chosen and rejected do not begin with the same messages")
        if prompt not in (None, chosen[:shared]) and not (isinstance(prompt, str) and prompt.strip() in said):
            raise ValueError(f"{where}: prompt: expected the messages that chosen and rejected begin with, got others")
        row |= {"prompt": chosen[:shared], "chosen": chosen[shared:], "rejected": rejected[shared:]}


def _border(chosen: str, rejected: str) -> int:
    """The length of the prompt that two dialogues begin with.

    The prompt ends behind the last "Assistant:" of HH-RLHF's form, else before the white space in front of the first
    word that differs, because tokens cross the middle of a word.
    """
    shared = commonprefix([chosen, rejected])
    if _ANSWER in shared:
        return shared.rindex(_ANSWER) + len(_ANSWER)
    inside = any(len(text) > len(shared) and not text[len(shared)].isspace() for text in (chosen, rejected))
    words = shared.rstrip() if shared[-1:].isspace() else shared
    if words == shared and (inside or chosen == rejected):
        words = shared[: max((n for n, letter in enumerate(shared) if letter.isspace()), default=0)].rstrip()
    return len(words)


def _shared(chosen: list[Row], rejected: list[Row]) -> int:
    """How many messages both begin with; what follows begins with an assistant turn in both."""
    alike = 0
    while alike < min(len(chosen), len(rejected)) and chosen[alike] == rejected[alike]:
        alike += 1
    while alike and not all(len(x) > alike and x[alike]["role"] == "assistant" for x in (chosen, rejected)):
        alike -= 1
    return alike
