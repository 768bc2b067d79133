"""Frozen weights in shards that several models have in common: the parts of a weight exist once.

Models on one base hold the very same parameters (`adapters`). FSDP2 puts each model into shards by itself. A whole
weight therefore notes its parts, and the next model in shards takes these parts where it holds the weight.
"""

import copy
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

_PART = "rlhf_fast_part"  # the attribute of a whole weight that has its parts


class Place(NamedTuple):
    """Where a weight stands in its model. A weight that two layers share has two places."""

    module: nn.Module
    name: str

    @property
    def weight(self) -> Any:
        """The weight of now: whole or a part."""
        return getattr(self.module, self.name)

    def put(self, weight: nn.Parameter) -> None:
        """Puts another weight there."""
        setattr(self.module, self.name, weight)


def places(model: nn.Module) -> list[Place]:
    """The places of all weights of a model."""
    return [Place(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)]


def emptied(model: PreTrainedModel) -> tuple[PreTrainedModel, list[tuple[Tensor, Place]]]:
    """A copy of `model` with its weights on the meta device, and these weights with their places in `model`."""
    found = {id(place.weight): place for place in places(model)}
    empty = {key: nn.Parameter(place.weight.to("meta"), place.weight.requires_grad) for key, place in found.items()}
    buffers = {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, {**empty, **buffers}), [(empty[key], place) for key, place in found.items()]


def taken_over(frozen: list[Place], mesh: DeviceMesh) -> list[tuple[Place, Any]]:
    """The places of weights whose parts another model has, with these parts; leaves empty weights there.

    Left out: a weight that the processes do not divide evenly, because FSDP2 pads its parts for each model anew.
    """
    parts = mesh.size(mesh.ndim - 1)
    taken, empty = [], dict[Any, nn.Parameter]()
    for place in frozen:
        part = getattr(place.weight, _PART, None)
        if part is None or part.device_mesh != mesh or not part.ndim or part.shape[0] % parts:
            continue
        if part not in empty:  # tied layers stay tied
            empty[part] = nn.Parameter(place.weight.detach().to("meta"), requires_grad=False)
        place.put(empty[part])
        taken.append((place, part))
    return taken


def note_parts(wholes: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Notes of whole weights their parts. wholes: (weight, part)."""
    for weight, part in wholes:
        setattr(weight, _PART, part)
