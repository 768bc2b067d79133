"""A model in shards over the processes of a run, by torch's FSDP2.

Each process keeps its part of every weight, of every gradient and of the optimizer's states. Every decoder layer is a
unit, whose weights are whole in every process while the layer runs. The rest of the model is the root's unit:
embeddings, last norm and head.

    shard(model, "full")
    loss = objectives.sft(...)  # enters by `forward.within`, where the head's weight is whole
    loss.backward()  # adds the gradients up over the processes; each process keeps its part of the sum
    with whole(model):  # all weights are whole, and no process waits for another process inside
        rollout = sampler(prompts)

A pass with gradients, and entering `whole`, need all processes: each of them makes the same number of such passes in
the same order. Passes without gradients therefore run in `whole`, where each process makes as many as it has rows.

Models on one base hold the very same parameters, before and after they are in shards: a model takes over the parts of
the frozen weights that it has in common with a model in shards.

FSDP2 and its tensors are used in this module alone. `one_copy` says how a machine holds the weights before.
"""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import PreTrainedModel

from rlhf_fast.failing import gone, lost
from rlhf_fast.lm.forward import enter_by, is_open, run_alike
from rlhf_fast.lm.passes import settle
from rlhf_fast.lm.precision import HALVES, decoder_layers, is_half
from rlhf_fast.lm.private import begin_in_shards, has_adapter
from rlhf_fast.lm.room import PASSES, NoRoom, check_room
from rlhf_fast.lm.shared_parts import Place, emptied, note_parts, places, taken_over
from rlhf_fast.lm.switches import agree, trial_rows
from rlhf_fast.ranks import connect, current

_SHARDS = "rlhf_fast_shards"  # the attribute of a root that says how it is sharded
_EXPERTS = "experts"  # the name of a layer's list of experts


@dataclass
class _Shards:
    units: list[Any]  # FSDP modules, the root last
    usual: Tensor | None = None  # what a trial gave before, until the first pass is compared with it
    whole: bool = False  # whether the model is inside `whole`
    frozen: list[tuple[Place, Any]] = field(default_factory=list)  # the frozen weights' parts
    empty: PreTrainedModel | None = None  # the model without shards, its weights on the meta device
    places: list[tuple[Tensor, Place]] = field(default_factory=list)  # of the weights of `empty` in the model


def shard(model: PreTrainedModel, how: str, *, checkpointing: bool = False, offload: bool = False) -> None:
    """Puts the weights of `model` into shards, in place; how: "none", "full" or "hybrid", as in the configs.

    Adapters that are trained stay whole in every process, and their gradients are added up as without shards. Their
    frozen base is sharded. All trials of a trained model are taken before, because a trial is a pass.
    A frozen weight that `model` has in common with a model in shards gets no parts of its own.
    checkpointing: whether the model is going to compute its activations again in the backward pass. offload: the parts
    of a frozen model on a GPU wait in CPU memory.
    Raises ValueError where FSDP2 does not take the model. The first pass in shards, or in `whole` of a frozen model,
    raises ValueError where it gives other numbers than before. It is not tried here, because a machine's CPU would hold
    the largest weights once for each process.
    """
    if how == "none" or is_sharded(model):
        return
    trained, name, device = bool(_trained(model)), type(model).__name__, model.device
    # A trial of half-precision weights takes fp32 copies, so that on a machine's CPU one process tries at a time.
    with current().in_turn() if device.type == "cpu" and is_half(model) else nullcontext():
        apart = trained and settle(model, checkpointing=checkpointing)
    mesh, usual = mesh_of(how, device.type), _trial(model)
    try:
        shard_untried(model, mesh, offload=offload)
        getattr(model, _SHARDS).usual = usual
        if apart:
            for part in (model, model.base_model):
                run_alike(part, functools.partial(_extra_runs, model))
        if not trained:
            check_room(whole_bytes(model), name, PASSES, device)
    except NoRoom:
        raise
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        if gone(error):  # it says nothing of the model
            raise lost(error) from error
        said = " ".join(str(error).split())
        raise ValueError(f"shard: expected a model that FSDP2 can shard, got {name}: {said:.240}") from error


def shard_frozen(model: PreTrainedModel, trained: PreTrainedModel | None, how: str, *, offload: bool = False) -> None:
    """`shard` of a frozen model, which stays whole where it holds whole weights of the model `trained` as well."""
    whole_ones = {id(parameter) for parameter in trained.parameters()} if trained is not None else set()
    if is_sharded(trained) or not any(id(parameter) in whole_ones for parameter in model.parameters()):
        shard(model, how, offload=offload)


def shard_untried(
    model: PreTrainedModel, mesh: DeviceMesh, *, offload: bool = False, reduce_scatter: Any = None
) -> None:
    """`shard` over the processes of `mesh` without a trial, for models whose tensors have no numbers.

    reduce_scatter: what sends gradients, in place of FSDP2's own; as `FSDPModule.set_custom_reduce_scatter` takes it.
    """
    trained = bool(_trained(model))
    _wrap(model, mesh, offload and not trained)
    if trained:
        enter_by(model, _register)
    if reduce_scatter is not None:
        for unit in getattr(model, _SHARDS).units:
            unit.set_custom_reduce_scatter(reduce_scatter)


@functools.cache
def mesh_of(how: str, device: str) -> DeviceMesh:
    """The processes as FSDP2 takes them: in one row ("full"), or in a row for each machine ("hybrid").

    Raises ValueError where no launcher has started this process.
    """
    if "RANK" not in os.environ:
        raise ValueError(f"shard: expected none in a process that no launcher such as torchrun has started, got {how}")
    size = current().size
    connect()
    return lay_out(how, device, size, int(os.environ.get("LOCAL_WORLD_SIZE", "0")))


def lay_out(how: str, device: str, size: int, local: int) -> DeviceMesh:
    """`size` processes as `mesh_of` says. local: processes of one machine, for "hybrid"."""
    if how == "full":
        return init_device_mesh(device, (size,))
    if local < 1 or size % local:
        raise ValueError(f"shard: expected equally many processes on each machine for hybrid, got {local} of {size}")
    return init_device_mesh(device, (size // local, local), mesh_dim_names=("replicas", "shards"))


def is_sharded(model: nn.Module | None) -> bool:
    """Whether `shard` has put the weights of the root `model` into shards."""
    return hasattr(model, _SHARDS)


@contextmanager
def whole(model: Any) -> Iterator[None]:
    """Inside, all weights of a sharded `model` are plain tensors. All processes enter; inside nobody waits for another.

    For passes without gradients, such as decoding. Nested, and for a model without shards, it does nothing.
    """
    shards: _Shards | None = getattr(model, _SHARDS, None)
    if shards is None or shards.whole:
        yield
        return
    shards.whole = True
    try:
        for unit in reversed(shards.units):  # the root, mostly the largest, first: its message is gone at the end
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        if not is_open(model):
            _compare(model, shards, lambda: _trial(model))
        yield
    finally:
        shards.whole = False
        root = shards.units[-1]
        if hasattr(root, "reset_iter_state"):  # forgets passes that an exception broke off, too
            root.reset_iter_state()
        for unit in shards.units:
            unit.reshard()
            unit.set_reshard_after_forward(unit is not root, recurse=False)


def _extra_runs(model: PreTrainedModel, runs: int) -> int:
    """How many runs of the layers a pass of another process makes more than `runs`."""
    return 0 if getattr(model, _SHARDS).whole else max(current().gather(runs)) - runs


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """Another model object on the very parameters and buffers of `model`.

    Of a model in shards inside `whole` alone. There the caller also puts the twin into shards, because the whole
    weights end with `whole`.
    """
    shards: _Shards | None = getattr(model, _SHARDS, None)
    if shards is None:
        tensors = (*model.parameters(), *model.buffers())
        return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})
    assert shards.whole and shards.empty is not None  # only a model with an adapter has twins
    note_parts((place.weight, part) for place, part in shards.frozen)
    memo = {id(empty): place.weight for empty, place in shards.places}
    return copy.deepcopy(shards.empty, memo | {id(buffer): buffer for buffer in shards.empty.buffers()})


def is_part(tensor: Tensor) -> bool:
    """Whether `tensor` is a weight, gradient or state in shards, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor in shards, in every process; all processes call it. Any other tensor as it is."""
    return tensor.full_tensor() if is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


def part_here(tensor: Tensor) -> Tensor:
    """The part that this process has of a tensor in shards; any other tensor as it is."""
    return tensor.to_local() if is_part(tensor) else tensor  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def whole_bytes(*models: nn.Module) -> int:
    """Bytes of the whole weights that `whole` makes of models in shards, with their padding; 0 without shards."""
    parts: set[Any] = {parameter for model in models for parameter in model.parameters() if is_part(parameter)}
    return sum(part.to_local().untyped_storage().nbytes() * part.device_mesh.size(-1) for part in parts)


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole `tensor` that belongs to the weight `like`: its part, or all of it."""
    if not is_part(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = like
    whole_one = tensor.to(like.device)
    return distribute_tensor(whole_one, sharded.device_mesh, sharded.placements, src_data_rank=None)


def is_saved_from_parts(model: PreTrainedModel) -> bool:
    """Whether saving the model takes weights in shards together. An adapter, which is saved alone, is never sharded."""
    return not has_adapter(model) and any(map(is_part, model.parameters()))


def pieces_of(model: PreTrainedModel, most: int) -> list[dict[str, Tensor]]:
    """The state dict of a model in shards, in pieces of about `most` bytes or of one decoder layer.

    All weights that are not in a decoder layer, tied ones among them, are in the first piece.
    """
    names = {id(module): f"{name}." for name, module in model.named_modules()}
    units = [names[id(layer)] for layer in _layers(model)]
    state = model.state_dict(keep_vars=True)  # the parameters themselves, because the same one may have two names
    by_unit: dict[str, dict[str, Tensor]] = {"": {}} | {unit: {} for unit in units}
    for name, tensor in state.items():
        by_unit[next((unit for unit in units if name.startswith(unit)), "")][name] = tensor
    pieces, size = [], 0
    for piece in by_unit.values():
        own = sum(tensor.numel() * tensor.itemsize for tensor in {id(x): x for x in piece.values()}.values())
        if not pieces or size + own > most:
            pieces.append({})
            size = 0
        pieces[-1] |= piece
        size += own
    return pieces


def gathered(piece: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The tensors whole, in CPU memory of the first process; None in the others. All processes call it."""
    found: dict[int, Tensor] = {}
    for tensor in piece.values():
        if id(tensor) not in found:
            together = full(tensor.detach())
            found[id(tensor)] = together.cpu() if current().first else tensor
    return {name: found[id(tensor)] for name, tensor in piece.items()} if current().first else None


def stays_whole(model: PreTrainedModel) -> set[nn.Parameter]:
    """The weights that `shard` leaves whole in every process: adapters that are trained."""
    return _trained(model) if has_adapter(model) else set()


def rows_of_part(rows: int, size: int, rank: int) -> tuple[int, int]:
    """Rows of a weight's part in the process `rank` of `size`: its own rows, and the rows that it keeps with padding.

    FSDP2 splits a weight of `rows` rows as `torch.chunk` does: 10 rows over 4 processes are 3, 3, 3 and 1 row.
    """
    kept = -(-rows // size)
    return max(0, min(kept, rows - rank * kept)), kept


def units_of(model: PreTrainedModel) -> list[Any]:
    """The modules whose weights are whole together: every decoder layer, and the root, which has the rest, last."""
    return [*_layers(model), model]


def _trained(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for parameter in model.parameters() if parameter.requires_grad}


def _wrap(model: PreTrainedModel, mesh: DeviceMesh, offload: bool) -> None:
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    # Nothing here keeps a weight that is sharded, because its memory is to be free as soon as a process has its part.
    halves = any(parameter.dtype in HALVES for parameter in model.parameters() if parameter.requires_grad)
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32 if halves else None, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": policy, "ignored_params": stays_whole(model)}
    shards, frozen = _Shards([]), [place for place in places(model) if not place.weight.requires_grad]
    if has_adapter(model) and _trained(model):
        shards.empty, shards.places = emptied(model)
    taken = taken_over(frozen, mesh)
    wholes = [ref(place.weight) for place in frozen]  # which other models may have too, and which nothing else keeps
    if offload and mesh.device_type != "cpu" and not taken:
        options["offload_policy"] = CPUOffloadPolicy()
    shards.units = units_of(model)
    for unit in shards.units:
        fully_shard(unit, reshard_after_forward=unit is not model, **options)
        unit.set_gradient_divide_factor(1.0)  # losses are sums over the processes
        unit.set_force_sum_reduction_for_comms(True)
        if any(child == _EXPERTS and isinstance(part, nn.ModuleList) for child, part in _children(unit)):
            # The rows of one process may choose experts that no row of another process has chosen.
            unit.set_reduce_scatter_unused_params(True)
        if mesh.device_type == "cpu":
            current().wait()  # a weight in shared memory (`one_copy`) is free when all processes have their parts of it
    for place, part in taken:
        place.put(part)
    shards.frozen = [(place, place.weight) for place in frozen]
    found = ((whole_one(), part) for whole_one, (_, part) in zip(wholes, shards.frozen, strict=True))
    note_parts((weight, part) for weight, part in found if weight is not None)
    setattr(model, _SHARDS, shards)
    begin_in_shards(model)


def _layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers that are units of their own: none where layers share weights (Zamba)."""
    layers = list(dict.fromkeys(decoder_layers(model)))
    owned = [id(parameter) for layer in layers for parameter in layer.parameters()]
    return layers if len({*owned}) == len(owned) else []


def _children(unit: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name.rpartition(".")[2], module) for name, module in unit.named_modules())


def _register(model: Any, name: str) -> None:
    """Makes the method of this name a forward of the root; a pass without gradients leaves nothing whole behind."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    register_fsdp_forward_method(model, name)
    entry = getattr(model, name)

    def run(passes: Callable[[], Any]) -> Any:
        shards: _Shards = getattr(model, _SHARDS)
        if not shards.whole:
            _compare(model, shards, lambda: run(lambda: _trial(model)))
        out = entry(passes)
        if not torch.is_grad_enabled() and not shards.whole:
            model.reshard()
        return out

    setattr(model, name, run)


@torch.no_grad()
def _compare(model: Any, shards: _Shards, repeat: Callable[[], Tensor | None]) -> None:
    """ValueError where the first pass of the model in shards gives other numbers than before. repeat: a `_trial`."""
    usual, shards.usual = shards.usual, None
    if usual is None:
        return
    with torch.autocast(usual.device.type, enabled=False):
        found = repeat()
    if found is None or not agree(found, usual):
        name = type(model).__name__.removeprefix("FSDP")
        raise ValueError(f"shard: expected a model that FSDP2 can shard, got other numbers from {name} in shards")


@torch.no_grad()
def _trial(model: PreTrainedModel) -> Tensor | None:
    """The last hidden states of a row of eight tokens; None of a model that cannot run here, which a pass will say."""
    (ids,), training = trial_rows(model, (8,)), model.training
    backbone: Any = model.base_model
    model.eval()
    try:
        return backbone(input_ids=ids, use_cache=False)[0]
    except Exception as error:
        if gone(error):
            raise lost(error) from error
        return None
    finally:
        model.train(training)
