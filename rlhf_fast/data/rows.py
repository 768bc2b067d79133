"""Reading and checking rows: JSON lines, Parquet, `datasets` directories, in-memory lists; writing JSON lines.

Left out: streaming, and reading from the network. `encoding` encodes the rows.
"""

import gzip
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from pathlib import Path
from typing import Any

Row = dict[str, Any]
COLUMNS = {
    "sft": ("completion",),
    "preference": ("chosen", "rejected"),
    "ranking": ("completions", "ranks"),
    "unpaired": ("completion", "label"),
    "prompt": (),
}
"""Kind of rows -> the columns that a row has beside its prompt."""
KINDS = tuple(COLUMNS)


class LocatedRow(dict):
    """A row that knows its place, because some errors of a row show only later."""

    __slots__ = ("where",)
    where: str  # file and line, or the number of the row


def load_rows(source: str | Path | Iterable[Row], kind: str) -> list[Row]:
    """Reads and checks rows.

    source: a `.jsonl`, `.jsonl.gz` or `.parquet` file, a directory written by `datasets.Dataset.save_to_disk`, or any
        iterable of dicts (a list, a `datasets.Dataset`).
    kind and its columns (other columns are kept):
        sft         prompt + completion, or messages
        preference  prompt + chosen + rejected (+ margin, a finite number)
        ranking     prompt + completions + ranks (integers, 0 is best, at least two different ones)
        unpaired    prompt + completion + label (true where the completion is good, false where it is bad)
        prompt      prompt
      A prompt is a string, or a list of messages ({"role", "content"}) that does not end in an assistant turn. After a
      prompt of messages a completion is a string or a list with one assistant message; otherwise it is a string.

    Raises ValueError with the file, the line and the column that is missing or has the wrong type. Lines count from 1;
    where a file has no lines, rows count. Raises FileNotFoundError if there is no such path.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    rows: list[Row] = []
    for where, row in read_rows(source):
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object with named columns, got {_type(row)}")
        _check_row(row, kind, where)
        located = LocatedRow(row)
        located.where = where
        rows.append(located)
    if not rows:
        raise ValueError(f"{source if isinstance(source, (str, Path)) else 'rows'}: no rows")
    return rows


def load_unpaired(source: str | Path | Iterable[Row]) -> list[Row]:
    """Rows of kind unpaired. Where the first row has `chosen`, rows of kind preference are read, and each makes two.

    The chosen completion gets the label true, the rejected completion false. Raises as `load_rows` does.
    """
    if not isinstance(source, (str, Path)):
        source = list(source)
    _, first = next(iter(read_rows(source)), ("", {}))
    if not (isinstance(first, dict) and first.get("chosen") is not None):
        return load_rows(source, "unpaired")
    rows: list[Row] = []
    for n, pair in enumerate(load_rows(source, "preference"), 1):
        for name, label in (("chosen", True), ("rejected", False)):
            row = LocatedRow(prompt=pair["prompt"], completion=pair[name], label=label)
            if f"{name}_finished" in pair:
                row["completion_finished"] = pair[f"{name}_finished"]
            row.where = place(pair, n)
            rows.append(row)
    return rows


def read_rows(source: str | Path | Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) from every source that `load_rows` takes, without looking at the columns.

    A place is for messages, such as "train.jsonl, line 3". Raises ValueError for a damaged file and FileNotFoundError
    for a path that is not there.
    """
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


def place(row: Row, number: int) -> str:
    """Where a row stands, for messages: the place that `load_rows` noted down, else the row's number."""
    return getattr(row, "where", f"row {number}")


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes a `.jsonl` or `.jsonl.gz` file under another name, then renames it; makes its directory."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.new")
    with gzip.open(partial, "wt") if path.suffix == ".gz" else open(partial, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(partial, path)


def _read_datasets(path: Path) -> Iterable[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not a directory written by `datasets.Dataset.save_to_disk`") from error
    if isinstance(dataset, datasets.DatasetDict):
        splits = ", ".join(map(str, dataset))
        raise ValueError(f"{path}: holds the splits {splits}; give the directory of one, {path}/<split>")
    return dataset  # pyright: ignore[reportReturnType]


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield f"{path}, line {number}", json.loads(line.decode("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip file: {error}") from error


def _check_row(row: Row, kind: str, where: str) -> None:
    if kind == "sft" and row.get("messages") is not None:
        _check_messages(row["messages"], f"{where}: messages")
        roles = [message["role"] for message in row["messages"]]
        if "assistant" not in roles:
            raise ValueError(f"{where}: messages: no assistant turn to train on")
        if roles[0] == "assistant":
            raise ValueError(f"{where}: messages: begins with an assistant turn, which needs one to follow")
        return
    completions = COLUMNS[kind]
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
    if kind == "unpaired" and not isinstance(row["label"], bool):
        raise ValueError(f"{where}: label: expected true or false, got {row['label']!r}")
    for name in completions:
        if name != "label":
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
