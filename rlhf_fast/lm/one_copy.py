"""A model that one process of each machine reads, and that the machine's other processes find in shared memory.

A model in shards is whole for a moment, before every process has its part of it. With `one_copy` a machine holds the
weights once in this moment, however many processes it runs. The first process of the machine loads the model as usual.
It then moves the weights to memory that all processes map, and hands the model itself on by pickle. The memory of a
weight is free again when every process has let go of it. It comes in about 32 pieces, so that a model whose layers are
sharded one after the other shrinks while its shards grow.

Nobody may write to the weights in place. Buffers and small tensors are copied, because models write to buffers.
The weights stand in a file without a name (memfd) where the system has these, else in a temporary file.
"""

import io
import os
import pickle
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from rlhf_fast.config.stages import Shard
from rlhf_fast.lm import parked
from rlhf_fast.ranks import Ranks, current

_SMALL = 1 << 14  # bytes; a tensor with fewer is copied
_PIECES = 32
_ALIGNED = 64  # bytes, for vector instructions


class _Place(NamedTuple):
    """Where a tensor stands: in the piece of this number from byte `start` on, or by its value."""

    piece: int
    start: int
    shape: torch.Size
    dtype: torch.dtype
    value: Tensor | None = None


class _Handed(NamedTuple):
    """What a machine's first process hands on. structure: the pickled model, None where pickle does not take it."""

    structure: bytes | None
    places: list[_Place]  # of the tensors of `_tensors`, and behind them of other tensors that the pickle names
    paths: list[str]  # of the pieces
    random_state: Tensor
    hooks: int  # the number of the next hook


def one_copy(load: Callable[[], PreTrainedModel], shard: Shard) -> PreTrainedModel:
    """`load()`, which one process of each machine calls where the model goes into shards. All processes call this.

    shard: as in the configs; with "none" every process calls `load`.
    Raises what `load` raises, in all processes.
    """
    ranks = current()
    if shard == "none" or ranks.size == 1:
        return load()
    reader, model, handed, error = _reader(ranks), None, None, None
    with ExitStack() as files:
        if reader == ranks.rank:
            try:
                model = load()
                handed = _hand_on(model, files)
            except Exception as raised:
                error = raised
        ranks.same_error(error)
        every = ranks.gather(handed)
        got: Any = every[reader]
        if reader != ranks.rank and got.structure is not None:
            model = ModelUnpickler(got).load()
        if any(one is not None and one.structure is None for one in every):
            model = _in_turn(ranks, load, got, model)
        ranks.wait()  # before the files are closed, because the other processes open them by name
    torch.set_rng_state(got.random_state)
    RemovableHandle.next_id = max(RemovableHandle.next_id, got.hooks)  # else a new hook would replace one of the model
    assert model is not None
    return model


def _reader(ranks: Ranks) -> int:
    """The process that reads for this one: the first of its machine."""
    firsts = [rank for rank, local in enumerate(ranks.gather(ranks.local)) if local == 0 and rank <= ranks.rank]
    return firsts[-1] if firsts else ranks.rank


def _in_turn(ranks: Ranks, load: Callable[[], PreTrainedModel], got: _Handed, model: PreTrainedModel | None) -> Any:
    """The model in a process that cannot unpickle it: loaded as usual, while no other process does so."""
    for rank in range(ranks.size):
        if rank == ranks.rank and model is None:
            model = load()
            pieces = _pieces(got)
            for tensor, place in zip(_tensors(model), got.places, strict=True):
                if isinstance(tensor, nn.Parameter):
                    tensor.data = _at(place, pieces)
        ranks.wait()
    return model


def _tensors(model: nn.Module) -> list[Tensor]:
    """All weights and buffers, each once, in the same order in every process; those of parked parts too."""
    owners = [model, *parked.parts(model)]
    found = [tensor for owner in owners for tensor in (*owner.parameters(), *owner.buffers())]
    return list({id(tensor): tensor for tensor in found}.values())


def _hand_on(model: PreTrainedModel, files: ExitStack) -> _Handed:
    """Moves the weights to shared memory, in place. files: closes the pieces."""
    places, paths = _move(_tensors(model), files)
    written = io.BytesIO()
    try:
        ModelPickler(written, _tensors(model), places).dump(model)
        structure = written.getvalue()
    except (AttributeError, TypeError, pickle.PicklingError):  # such as a function inside a function
        structure = None
    return _Handed(structure, places, paths, torch.get_rng_state(), RemovableHandle.next_id)


class ModelPickler(pickle.Pickler):
    """Names the tensors, in place of pickling them, by their numbers in `places`, to which it adds those it lacks."""

    # Not a class inside a function, because such a class keeps what it has seen until the garbage is collected.

    def __init__(self, file: io.BytesIO, tensors: list[Tensor], places: list[_Place]) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
        self.others: list[Tensor] = []
        self.places = places

    def persistent_id(self, obj: Any) -> tuple[int, bool, bool] | None:
        if not isinstance(obj, Tensor) or type(obj) not in (Tensor, nn.Parameter) or obj.is_meta:
            return None
        if id(obj) not in self.numbers:  # such as a copy of a buffer that a module keeps as a plain attribute
            self.numbers[id(obj)] = len(self.places)
            self.others.append(obj)  # keeps its id
            self.places.append(_Place(0, 0, obj.shape, obj.dtype, obj.detach().clone()))
        return self.numbers[id(obj)], isinstance(obj, nn.Parameter), obj.requires_grad


class ModelUnpickler(pickle.Unpickler):
    """Finds the tensors that `ModelPickler` has named."""

    def __init__(self, handed: _Handed) -> None:
        assert handed.structure is not None
        super().__init__(io.BytesIO(handed.structure))
        self.places, self.pieces = handed.places, _pieces(handed)
        self.found: dict[int, Tensor] = {}

    def persistent_load(self, pid: Any) -> Tensor:
        number, is_parameter, trained = pid
        if number not in self.found:
            tensor = _at(self.places[number], self.pieces)
            own = nn.Parameter(tensor, requires_grad=trained) if is_parameter else tensor.clone()
            self.found[number] = own.requires_grad_(trained)
        return self.found[number]


def _move(tensors: list[Tensor], files: ExitStack) -> tuple[list[_Place], list[str]]:
    """Moves large weights to pieces of shared memory; places of all tensors, paths of the pieces."""
    enough = sum(tensor.nbytes for tensor in tensors) // _PIECES
    places, paths, piece, size = [], [], [], 0
    for tensor in tensors:
        if tensor.nbytes < _SMALL or tensor.is_meta or type(tensor.data) is not Tensor:
            places.append(_Place(0, 0, tensor.shape, tensor.dtype, tensor.detach().clone()))
            continue
        place = _Place(len(paths), size, tensor.shape, tensor.dtype)
        places.append(place)
        piece.append((tensor, place))
        size += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        if size >= enough:
            paths.append(_fill(piece, size, files))
            piece, size = [], 0
    if piece:
        paths.append(_fill(piece, size, files))
    return places, paths


def _fill(tensors: list[tuple[Tensor, _Place]], size: int, files: ExitStack) -> str:
    """The path of a new piece of `size` bytes with these tensors."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("rlhf_fast")
        files.callback(os.close, descriptor)
        path = f"/proc/{os.getpid()}/fd/{descriptor}"
    else:
        descriptor, path = tempfile.mkstemp()
        os.close(descriptor)
        files.callback(os.unlink, path)
    held = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
    for tensor, place in tensors:
        shared = _at(place._replace(piece=0), [held])
        shared.copy_(tensor.detach())
        if isinstance(tensor, nn.Parameter):  # a buffer stays this process's own
            tensor.data = shared
    return path


def _pieces(handed: _Handed) -> list[Tensor]:
    """The pieces of shared memory as this process maps them, [bytes] uint8 each."""
    sizes = [os.stat(path).st_size for path in handed.paths]
    return [
        torch.from_file(path, shared=True, size=size, dtype=torch.uint8)
        for path, size in zip(handed.paths, sizes, strict=True)
    ]


def _at(place: _Place, pieces: list[Tensor]) -> Tensor:
    """The tensor at a place."""
    if place.value is not None:
        return place.value
    bytes_of = pieces[place.piece][place.start : place.start + place.shape.numel() * place.dtype.itemsize]
    return bytes_of.view(place.dtype).view(place.shape)
