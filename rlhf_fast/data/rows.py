"""Reading and checking rows; writing JSON lines.

`readers` reads files, `forms` brings rows into our form, and `encoding` encodes them.
"""

import gzip
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from rlhf_fast.data.damage import writing
from rlhf_fast.data.files import being_written
from rlhf_fast.data.forms import COLUMNS, in_our_form, renamed
from rlhf_fast.data.messages import is_trained, type_name
from rlhf_fast.data.readers import Row, read_rows

__all__ = [
    "COLUMNS",
    "KINDS",
    "LocatedRow",
    "Row",
    "check_unicode",
    "load_rows",
    "load_unpaired",
    "place",
    "read_rows",
    "write_rows",
]

KINDS = tuple(COLUMNS)
_LARGEST = (2 - 2**-23) * 2**127  # of float32
_USED = ("prompt", "messages", "tools", "chat_template_kwargs")
_SURROGATE = re.compile("[\ud800-\udfff]")


class LocatedRow(dict):
    """A row that knows its place, because some errors of a row show only later."""

    __slots__ = ("where",)
    where: str  # file and line, or the number of the row


def load_rows(
    source: str | Path | Iterable[Row],
    kind: str,
    columns: Mapping[str, str] | None = None,
    errors: list[str] | None = None,
) -> list[Row]:
    """Reads and checks rows.

    source: a `.jsonl`, `.json` (an array, or JSON lines), `.csv` or `.tsv` file, each also with `.gz`, a `.parquet`
        file, a directory written by `datasets.Dataset.save_to_disk`, a folder or a glob of such files (read in the
        order of their names), `hub:NAME:SPLIT`, or any iterable of dicts (a list, a `datasets.Dataset`).
    kind and its columns (other columns are kept):
        sft         prompt + completion, or messages
        preference  prompt + chosen + rejected (+ margin, a finite number)
        ranking     prompt + completions + ranks (integers, 0 is best, at least two different ones)
        unpaired    prompt + completion + label (true where the completion is good, false where it is bad)
        prompt      prompt
      A prompt is a string, or a list of messages ({"role", "content"}). If it ends in an assistant turn, this turn is
      an answer that has begun, and the completion goes on in it. After a prompt of messages a completion is a string or
      a list with one assistant message; otherwise it is a string. An answer of a pair may be several messages, of which
      the first and the last are assistant turns.
      `forms` says which other forms are read too.
    columns: our name -> the name in the data, for columns that the data name otherwise.
    errors: gets what is wrong with malformed rows, which are left out; default: the first such row is an error.

    Raises ValueError with the file, the line and the column that is missing or has the wrong type. Lines count from 1;
    where a file has no lines, rows count. Raises FileNotFoundError if there is no such path.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rows: list[Row] = []
    for where, row in read_rows(source):
        try:
            rows.append(_checked(row, kind, columns, where))
        except ValueError as error:
            if errors is None:
                raise
            errors.append(str(error))
    if not rows and not errors:
        raise ValueError(f"{source if isinstance(source, (str, Path)) else 'rows'}: no rows")
    return rows


def _checked(row: Any, kind: str, columns: Mapping[str, str] | None, where: str) -> LocatedRow:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with named columns, got {type_name(row)}")
    row = in_our_form(renamed(row, columns, kind, where) if columns else row, kind, where)
    _check_row(row, kind, where)
    _check_text(row, kind, where)
    located = LocatedRow(row)
    located.where = where
    return located


def load_unpaired(
    source: str | Path | Iterable[Row],
    columns: Mapping[str, str] | None = None,
    errors: list[str] | None = None,
) -> list[Row]:
    """Rows of kind unpaired. Where the first row has `chosen`, rows of kind preference are read, and each makes two.

    The chosen completion gets the label true, the rejected completion false. Takes and raises what `load_rows` does.
    """
    if not isinstance(source, (str, Path)):
        source = list(source)
    _, first = next(iter(read_rows(source)), ("", {}))
    chosen = (columns or {}).get("chosen", "chosen")
    if not (isinstance(first, dict) and first.get(chosen) is not None):
        return load_rows(source, "unpaired", columns, errors)
    rows: list[Row] = []
    for n, pair in enumerate(load_rows(source, "preference", columns, errors), 1):
        for name, label in (("chosen", True), ("rejected", False)):
            rest = {name: pair[name] for name in _USED if name in pair and name != "messages"}
            row = LocatedRow(rest, completion=pair[name], label=label)
            if f"{name}_finished" in pair:
                row["completion_finished"] = pair[f"{name}_finished"]
            row.where = place(pair, n)
            rows.append(row)
    return rows


def place(row: Row, number: int) -> str:
    """Where a row stands, for messages: the place that `load_rows` noted down, else the row's number."""
    return getattr(row, "where", f"row {number}")


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes a `.jsonl` or `.jsonl.gz` file under another name, then renames it; makes its directory."""
    path = Path(path)
    partial = being_written(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with gzip.open(partial, "wt") if path.suffix == ".gz" else open(partial, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
            os.replace(partial, path)
        except OSError:
            partial.unlink(missing_ok=True)  # what was written of it would keep the disk full
            raise


def _check_row(row: Row, kind: str, where: str) -> None:
    if kind == "sft" and row.get("messages") is not None:
        if not any(map(is_trained, row["messages"])):
            raise ValueError(f"{where}: messages: no assistant turn to train on")
        if is_trained(row["messages"][0]):
            raise ValueError(f"{where}: messages: begins with an assistant turn, which needs one to follow")
        return
    completions = COLUMNS[kind]
    missing = [name for name in ["prompt", *completions] if row.get(name) is None]
    if missing:
        columns = ", ".join(["prompt", *completions]) + (" (or messages)" if kind == "sft" else "")
        raise ValueError(f"{where}: missing {', '.join(missing)}; a row of kind {kind} needs {columns}")
    chat = not isinstance(row["prompt"], str)
    if chat and row["prompt"][-1]["role"] == "assistant" and not row["prompt"][-1].get("content"):
        raise ValueError(f"{where}: prompt: ends in an assistant turn without text, in which no completion can go on")
    if kind == "ranking":
        _check_ranking(row, chat, where)
        return
    if kind == "unpaired" and not isinstance(row["label"], bool):
        raise ValueError(f"{where}: label: expected true or false, got {row['label']!r}")
    for name in completions:
        if name != "label":
            _check_completion(row[name], chat, f"{where}: {name}", several=kind == "preference")
    if kind == "preference" and row.get("margin") is not None:
        margin = row["margin"]
        if isinstance(margin, bool) or not isinstance(margin, Real) or not abs(margin) < math.inf:
            raise ValueError(f"{where}: margin: expected a finite number, got {margin!r}")
        if abs(margin) > _LARGEST:
            raise ValueError(f"{where}: margin: expected a number that float32 holds, got {margin!r:.80}")


def _check_ranking(row: Row, chat: bool, where: str) -> None:
    completions, ranks = row["completions"], row["ranks"]
    for name in ("completions", "ranks"):
        if not isinstance(row[name], list):
            raise ValueError(f"{where}: {name}: expected a list, got {type_name(row[name])}")
    for n, completion in enumerate(completions):
        _check_completion(completion, chat, f"{where}: completions[{n}]")
    if len(ranks) != len(completions):
        raise ValueError(f"{where}: ranks: {len(ranks)} ranks for {len(completions)} completions")
    if any(isinstance(rank, bool) or not isinstance(rank, Integral) or rank < 0 for rank in ranks):
        raise ValueError(f"{where}: ranks: expected integers from 0 (the best), got {ranks!r:.80}")
    if len(set(ranks)) < 2:
        raise ValueError(f"{where}: ranks: expected at least two different ranks, got {ranks!r}")


def _check_completion(completion: Any, chat: bool, where: str, *, several: bool = False) -> None:
    """several: whether an answer may hold several messages, such as a call of a tool, its result and what follows."""
    if isinstance(completion, str):
        return
    if not chat:
        raise ValueError(f"{where}: expected a string, got {type_name(completion)}")
    roles = [message["role"] for message in completion]
    if several and roles[0] != "assistant":
        raise ValueError(f"{where}: expected messages from an assistant turn on, got the roles {', '.join(roles)}")
    if several and roles[-1] != "assistant":
        raise ValueError(f"{where}: expected messages up to an assistant turn, got the roles {', '.join(roles)}")
    if not several and roles != ["assistant"]:
        raise ValueError(f"{where}: expected one assistant message, got the roles {', '.join(roles)}")
    if not all(is_trained(message) for message in completion if message["role"] == "assistant"):
        raise ValueError(f"{where}: weight: expected 1 in an answer, which is trained on as a whole, got 0")


def _check_text(row: Row, kind: str, where: str) -> None:
    """ValueError for half an emoji in a column that is used; a reward function uses every column of a prompt's row."""
    for name in row if kind == "prompt" else (*_USED, *COLUMNS[kind]):
        check_unicode(row.get(name), f"{where}: {name}")


def check_unicode(value: Any, where: str) -> None:
    """ValueError where a text, or a text in lists and objects, holds half an emoji, which no tokenizer takes."""
    for text in _texts_in(value):
        if not text.isascii() and (found := _SURROGATE.search(text)):
            raise ValueError(
                f"{where}: expected Unicode text, got half an emoji (a lone surrogate) at character "
                f"{found.start() + 1}: {text[max(0, found.start() - 20) : found.end()]!a}"
            )


def _texts_in(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts_in(name)
            yield from _texts_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts_in(item)
