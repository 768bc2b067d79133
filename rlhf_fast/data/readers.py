"""Rows as they stand in files: JSON lines, JSON arrays, CSV, Parquet, `datasets` directories, shards and hub names.

Left out: streaming. `rows` checks the rows, and `forms` brings them into the form that the encoders take.
"""

import csv
import glob
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_fast.data.damage import sentence

Row = dict[str, Any]
_TEXT_FILES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_HUB = "hub:"
_EXPECTED = ".jsonl, .json, .csv, .tsv (also with .gz), .parquet or a `datasets` directory"
_SHARD = re.compile(r"(.+)-\d+-of-(\d+)\.")


class Cells(dict):
    """A row of a CSV file, in which every value is text."""


class Record(dict):
    """A row of a typed table, in which every object of a column has the keys of all of them, null where it had none."""


def read_rows(source: str | Path | Iterable[Row]) -> Iterator[tuple[str, Any]]:
    """Yields (place, row) from every source that `load_rows` takes, without looking at the columns.

    A place is for messages, such as "train.jsonl, line 3". Raises ValueError for a damaged file and FileNotFoundError
    for a path that is not there.
    """
    if not isinstance(source, (str, Path)):
        typed = hasattr(source, "features")  # a `datasets.Dataset`
        yield from ((f"row {n}", Record(row) if typed else row) for n, row in enumerate(source, 1))
    elif str(source).startswith(_HUB):
        yield from _numbered(str(source), map(Record, _read_hub(str(source))))
    else:
        for path in data_files(source):
            yield from _read(path)


def data_files(source: str | Path) -> list[Path]:
    """The files behind a path, in the order they are read: a file, a glob's files, or a folder's shards by name.

    A directory written by `datasets` counts as one file. Raises FileNotFoundError where there is none, and ValueError
    for a folder that holds no data files, several kinds of files, several splits, or a part of a split's shards.
    """
    path = Path(source)
    if not path.exists():
        if found := sorted(Path(name) for name in glob.glob(str(source), recursive=True) if Path(name).is_file()):
            return found
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_dir() and not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _shards(path)
    return [path]


def _shards(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.iterdir() if not file.name.startswith(".") and _kind(file) is not None)
    if not files:
        raise ValueError(
            f"{folder}: not a directory written by `datasets.Dataset.save_to_disk`, and it holds no .jsonl, .json, "
            ".csv, .tsv or .parquet files"
        )
    kinds = sorted({str(_kind(file)) for file in files})
    if len(kinds) > 1:
        raise ValueError(f"{folder}: holds {' and '.join(kinds)} files; name one kind, such as {folder}/*{kinds[-1]}")
    shards = [_SHARD.match(file.name) for file in files]
    splits = sorted({shard[1] for shard in shards if shard})
    if len(splits) > 1:
        raise ValueError(f"{folder}: holds the splits {', '.join(splits)}; name one, such as {folder}/{splits[0]}-*")
    expected = max((int(shard[2]) for shard in shards if shard), default=0)
    if expected > len(files):
        raise ValueError(f"{folder}: expected {expected} shards, as their names say, found {len(files)}")
    return files


def _kind(path: Path) -> str | None:
    """The ending that says how a file is read, without .gz; None for any other file."""
    text = Path(path.name.removesuffix(".gz")).suffix
    return text if text in _TEXT_FILES else ".parquet" if path.suffix == ".parquet" else None


def _read(path: Path) -> Iterator[tuple[str, Any]]:
    kind = _kind(path)
    if path.is_dir():
        yield from _numbered(str(path), map(Record, _read_datasets(path)))
    elif kind is None:
        raise ValueError(f"{path}: expected {_EXPECTED}")
    elif kind == ".parquet":
        yield from _numbered(str(path), map(Record, _read_parquet(path)))
    elif kind in (".csv", ".tsv"):
        yield from _read_table(path, "," if kind == ".csv" else "\t")
    else:
        yield from _read_json(path) if kind == ".json" else _read_json_lines(path)


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    return ((f"{name}, row {n}", row) for n, row in enumerate(rows, 1))


# ------------------------------------------------------------------------------------------------ text


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")  # Windows writes a byte order mark first
                if text.strip():
                    yield f"{path}, line {number}", json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:  # also for numbers of thousands of digits, and endless nesting
        raise ValueError(f"{path}, line {number}: not JSON in UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}, after line {number}: damaged gzip file: {error}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that stands twice, because one of its two values would be lost."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"expected every key once, got {max(names, key=names.count)!r} twice")
    return values


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    """An array of rows, or JSON lines under another name, which many data sets are."""
    text = _text(path)
    if not text.lstrip().startswith("["):
        return _read_json_lines(path)
    try:
        return _numbered(str(path), json.loads(text, object_pairs_hook=_object))
    except (ValueError, RecursionError) as error:
        where = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ValueError(f"{path}{where}: not JSON in UTF-8: {error}") from error


def _read_table(path: Path, delimiter: str) -> Iterator[tuple[str, Any]]:
    text, limit = _text(path), csv.field_size_limit(sys.maxsize)  # the usual limit is 131,072 characters a cell
    table, lines, start = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True), [], 1
    try:
        for cells in table:
            if cells:
                lines.append((start, cells))
            start = table.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {start}: not a table: {error}") from error
    finally:
        csv.field_size_limit(limit)
    if not lines:
        return
    _, names = lines[0]
    if len(set(names)) < len(names):
        raise ValueError(f"{path}, line 1: expected column names that differ, got {', '.join(names)}")
    for number, cells in lines[1:]:
        where = f"{path}, line {number}"
        if len(cells) != len(names):
            raise ValueError(f"{where}: expected {len(names)} cells, as in the first line, got {len(cells)}")
        yield where, Cells(zip(names, cells, strict=True))


def _text(path: Path) -> str:
    """The whole file without its byte order mark."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: not text in UTF-8: {error}") from error
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from error


# ------------------------------------------------------------------------------------------------ tables


def _read_parquet(path: Path) -> Iterable[Row]:
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    except Exception as error:  # pyarrow raises many kinds for damage: OSError, ArrowInvalid, MemoryError, TypeError
        raise ValueError(f"{path}: not a Parquet file: {sentence(error)}") from error


def _read_datasets(path: Path) -> Iterable[Row]:
    import datasets

    try:
        dataset = datasets.load_from_disk(str(path))
    except FileNotFoundError as error:
        raise ValueError(f"{path}: not a directory written by `datasets.Dataset.save_to_disk`") from error
    except Exception as error:
        raise ValueError(f"{path}: a damaged directory of `datasets`: {sentence(error)}") from error
    return _whole(_one_split(dataset, str(path), f"give the directory of one, {path}/<split>"), path)


def _whole(rows: Any, path: Path) -> Iterator[Row]:
    """The rows, whose bytes are read only now. Damaged bytes that pyarrow does not look at would end the process."""
    try:
        rows.data.validate(full=True)
        yield from rows
    except Exception as error:
        raise ValueError(f"{path}: a damaged directory of `datasets`: {sentence(error)}") from error


def _read_hub(source: str) -> Iterable[Row]:
    """`hub:NAME:SPLIT`, or `hub:NAME:CONFIGURATION:SPLIT` for a data set of several."""
    parts = re.fullmatch(_HUB + r"([^:]+)(?::([^:\[]+))?:([^:\[]+(?:\[.*\])?)", source)
    if parts is None:
        raise ValueError(f"{source}: expected hub:NAME:SPLIT, such as hub:openai/gsm8k:main:train")
    import datasets
    from datasets.exceptions import DatasetsError

    load: Callable[..., Any] = datasets.load_dataset
    # Before 4.0 a data set could bring code of its own, and `datasets` asked at the terminal whether to run it.
    options = {"trust_remote_code": False} if int(datasets.__version__.partition(".")[0]) < 4 else {}
    try:
        dataset = load(parts[1], parts[2], split=parts[3], **options)
    except (ValueError, OSError, DatasetsError) as error:
        raise ValueError(f"{source}: `datasets` cannot load it: {' '.join(str(error).split())}") from error
    return _one_split(dataset, source, "name one")


def _one_split(dataset: Any, where: str, advice: str) -> Iterable[Row]:
    import datasets

    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{where}: holds the splits {', '.join(map(str, dataset))}; {advice}")
    return dataset
