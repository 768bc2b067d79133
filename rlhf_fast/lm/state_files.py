"""Optimizer states in shards in files: each process writes its parts, and any number of processes reads them again.

torch's distributed checkpoints (DCP) write the parts, as safetensors files without pickled code:

    plain, parts = split(state)  # nested dicts and lists; a tensor without data stands for each tensor in `parts`
    write(parts, directory)  # all processes
    place(plain, directory)  # later: says of the tensors without data where their numbers are
    moments = parts_of([(moment, weight), ...])  # what this process keeps of them, whatever the processes were before

A tensor without data is on the meta device, and has the shape and dtype of the whole tensor.
"""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhf_fast.data.damage import sentence
from rlhf_fast.lm.sharding import is_part, part_of

_KEPT = "rlhf_fast_kept"  # the attribute of a tensor without data: (directory, name)


def split(state: Any, name: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Nested dicts and lists with tensors without data in place of tensors in shards; these tensors by their names."""
    if isinstance(state, Tensor) and is_part(state):
        return torch.empty(state.shape, dtype=state.dtype, device="meta"), {name: state.detach()}
    parts: dict[str, Tensor] = {}

    def plain(key: object, item: Any) -> Any:
        inner, found = split(item, f"{name}/{key}" if name else str(key))
        parts.update(found)
        return inner

    if isinstance(state, dict):
        return {key: plain(key, item) for key, item in state.items()}, parts
    if isinstance(state, list | tuple):
        return type(state)(plain(i, item) for i, item in enumerate(state)), parts
    return state, parts


def write(parts: dict[str, Tensor], directory: Path) -> None:
    """Writes the parts of this process to `directory`. All processes call it, and all raise where one cannot write.

    Raises OSError on a full disk, and where the processes do not see the same files.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    try:
        save(dict(parts), storage_writer=HuggingFaceStorageWriter(str(directory), save_distributed=True))
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from error


def place(state: Any, directory: Path) -> None:
    """Says of the tensors without data in `state` that their numbers are in `directory`."""
    for name, tensor in _tensors(state, ""):
        if tensor.is_meta:
            setattr(tensor, _KEPT, (directory, name))


def parts_of(pairs: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """What this process keeps of whole tensors. pairs: a tensor, perhaps without data, and the weight it belongs to.

    Raises ValueError, naming the directory, where the files do not hold all numbers of a tensor without data.
    """
    found = [
        torch.empty_like(weight, dtype=saved.dtype) if saved.is_meta else part_of(saved, weight)
        for saved, weight in pairs
    ]
    wanted: dict[Path, dict[str, Tensor]] = {}
    for (saved, _), tensor in zip(pairs, found, strict=True):
        if saved.is_meta:
            directory, name = getattr(saved, _KEPT)
            wanted.setdefault(directory, {})[name] = tensor
    for directory, tensors in wanted.items():
        _read(directory, tensors)
    return found


def _read(directory: Path, tensors: dict[str, Tensor]) -> None:
    """Sets the tensors, parts of tensors in shards included, to their numbers in `directory`."""
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    try:
        known: Any = HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
        for name, tensor in tensors.items():
            held = known.get(name)
            count = sum(chunk.sizes.numel() for chunk in held.chunks) if held is not None else 0
            if held is None or held.size != tensor.shape or count != tensor.numel():
                raise ValueError(f"found {count} of the {tensor.numel()} numbers of {name}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it reads as one process, as it is meant to
            load(dict(tensors), storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    except (CheckpointException, KeyError, OSError, SafetensorError, TypeError, ValueError) as error:
        if isinstance(error, CheckpointException):
            error, _ = next(iter(error.failures.values()))
        expected = f"{directory}: expected the states of the optimizer's weights, but the directory is damaged"
        raise ValueError(f"{expected}: {sentence(error)}") from error


def _tensors(state: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(state, Tensor):
        yield name, state
    inside = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    for key, item in inside:
        yield from _tensors(item, f"{name}/{key}" if name else str(key))
