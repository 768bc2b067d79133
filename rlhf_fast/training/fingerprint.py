"""What a run's data and models hold, as a short text, so that a file that was replaced is noticed."""

import glob
import gzip
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from transformers import PreTrainedModel

from rlhf_fast.config import StageConfig

DATA_FIELDS = ("train_data", "eval_data", "eval_pairs", "eval_rows")
"""The fields of configs that name rows."""
_PIECE = 1 << 20  # bytes
_ABOUT_FILES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # not about what a model computes


def fingerprints(config: StageConfig) -> dict[str, str]:
    """Field -> the fingerprint of its rows, for the fields of `config` whose rows can be read twice."""
    found = {name: fingerprint(getattr(config, name, None)) for name in DATA_FIELDS}
    return {name: value for name, value in found.items() if value is not None}


def fingerprint(source: Any) -> str | None:
    """SHA-256 of the content of files, or of rows in memory; None for an iterator and for a name that is no file.

    source: as `load_rows` takes it. A directory has all its files, but for the caches of `datasets`. A .gz file has the
    bytes that it unpacks to, because its header holds the time of writing.
    """
    digest = hashlib.sha256()
    if isinstance(source, str | Path):
        files = _files(str(source))
        for path in files:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
                while piece := cast(BinaryIO, file).read(_PIECE):
                    digest.update(piece)
            digest.update(b"\0")  # so that no line can wander from one file to the next
        return digest.hexdigest() if files else None
    if not (isinstance(source, Sequence) or hasattr(source, "__getitem__")):
        return None
    for row in cast(Iterable, source):
        digest.update(json.dumps(row, sort_keys=True, default=_kind).encode() + b"\n")
    return digest.hexdigest()


def of_values(rows: Iterable[Any]) -> str:
    """SHA-256 of values that JSON can hold."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row).encode() + b"\n")
    return digest.hexdigest()


def of_weights(model: PreTrainedModel) -> str:
    """SHA-256 of a model's weights, by name, dtype and bits, and of the config that says what is computed of them."""
    settings = model.config.to_dict()
    named = {name: value for name, value in settings.items() if name not in _ABOUT_FILES}
    digest = hashlib.sha256(json.dumps([type(model).__name__, named], sort_keys=True, default=_kind).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _files(source: str) -> list[Path]:
    path = Path(source)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    return sorted(file for file in found if file.is_file() and not file.name.startswith("cache-"))


def _kind(value: Any) -> str:
    """What stands for a value that JSON does not know: its class alone, because its text may hold an address."""
    return type(value).__name__
