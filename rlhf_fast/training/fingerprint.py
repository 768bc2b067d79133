"""What a run's data, models and rewards hold, as a short text, so that a file that was replaced is noticed."""

import glob
import gzip
import hashlib
import importlib.util
import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from transformers import PreTrainedModel

from rlhf_fast.config.stages import KINDS
from rlhf_fast.lm import adapters, manifest
from rlhf_fast.lm.paths import commit_of

_PIECE = 1 << 20  # bytes
_ABOUT_FILES = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")  # not about what a model computes


def fingerprints(config: Any) -> dict[str, Any]:
    """Field -> the fingerprint of what it names, for the fields of `config` whose content can be read twice.

    These are rows, models, rewards and the file of the chat template. Several rewards have a list of fingerprints.
    """
    of = {"model": of_model, "reward": of_reward}
    given = {name: getattr(config, name) for name in KINDS if getattr(config, name, None) is not None}
    found = {name: of.get(KINDS[name], fingerprint)(value) for name, value in given.items()}
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


def of_model(path: str | Path) -> str | None:
    """SHA-256 of the names and contents of a model's files; of a model of the hub its commit.

    An adapter has its base's files too. None where there is no such model on this machine.
    """
    if not Path(path).is_dir():
        return commit_of(str(path))
    digest = hashlib.sha256()
    for file in manifest.model_files(path):
        digest.update(f"{file.name} {manifest.digest(file)}\n".encode())
    if adapters.is_adapter(path):
        digest.update(str(of_model(adapters.base_path(path))).encode())
    return digest.hexdigest()


def of_reward(spec: Any) -> Any:
    """That of a reward model, or SHA-256 of a function's name and of the file that it stands in.

    A list of rewards has a list. None where the function stands in no file. The files that the function's file imports
    do not count.
    """
    if isinstance(spec, list | tuple):
        return [of_reward(one) for one in spec]
    if callable(spec):
        named = inspect.unwrap(spec) if hasattr(spec, "__qualname__") else type(spec)
        try:
            file, name = inspect.getsourcefile(cast(Any, named)), named.__qualname__
        except TypeError:  # of a C extension
            return None
    elif ":" not in str(spec) or Path(spec).is_dir():
        return of_model(spec)
    else:
        module, _, name = str(spec).rpartition(":")
        file = module if module.endswith(".py") else _file_of(module)
    if file is None or not Path(file).is_file():
        return None
    return hashlib.sha256(f"{name} {manifest.digest(Path(file))}".encode()).hexdigest()


def _file_of(module: str) -> str | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    return spec.origin if spec is not None else None


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
    if "{{" in source or "{%" in source:  # a chat template itself
        return []
    path = Path(source)
    if path.is_file():
        return [path]
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(source, recursive=True))
    return sorted(file for file in found if file.is_file() and not file.name.startswith("cache-"))


def _kind(value: Any) -> str:
    """What stands for a value that JSON does not know: its class alone, because its text may hold an address."""
    return type(value).__name__
