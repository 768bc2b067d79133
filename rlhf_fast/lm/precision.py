"""Trials of half-precision models in fp32, where right paths agree to many digits.

In bf16 two right paths of a deep model differ by several percent, because they round at different places. Nothing small
could be told from that. A trial therefore runs on fp32 copies of the weights, four more bytes a weight for a moment. It
leaves out layers that are like earlier layers but for their weights, because a copy of a whole model would take more
memory than training an adapter does.

Left out: weights of tensor subclasses (quantised, sharded), which stay as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

HALVES = (torch.bfloat16, torch.float16)
_INDICES = ("layer_idx", "layer_id", "layer_number")  # a layer's place alone


def is_half(model: nn.Module) -> bool:
    """Whether any weight of the model has two bytes."""
    return any(parameter.dtype in HALVES for parameter in model.parameters())


@contextmanager
def trial(model: nn.Module) -> Iterator[None]:
    """`exact`, and a half-precision model has only its first layers until no later layer is of another kind."""
    with _few_layers(model) if is_half(model) else nullcontext(), exact(model):
        yield


@contextmanager
def exact(model: nn.Module) -> Iterator[None]:
    """Inside, autocast is off, and the model's half-precision weights and buffers have their values in fp32."""
    found = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in HALVES and type(t.data) is torch.Tensor]
    kept = [tensor.data for tensor in found]
    device = next((parameter.device.type for parameter in model.parameters()), "cpu")
    try:
        for tensor in found:
            tensor.data = tensor.data.float()
        with torch.autocast(device, enabled=False):
            yield
    finally:
        for tensor, data in zip(found, kept, strict=True):
            tensor.data = data


@contextmanager
def _few_layers(model: nn.Module) -> Iterator[None]:
    config: Any = getattr(model, "config", None)
    if config is None:
        yield
        return
    text: Any = config.get_text_config()
    found = _layers(model, text.num_hidden_layers)
    count = 0 if found is None else layers_of_a_trial(found[2], text)
    if found is None or count == len(found[2]):
        yield
        return
    owner, name, layers = found
    types, number = getattr(text, "layer_types", None), text.num_hidden_layers
    try:
        setattr(owner, name, nn.ModuleList(list(layers)[:count]))
        text.num_hidden_layers = count  # caches read both
        if types:
            text.layer_types = types[:count]
        yield
    finally:
        setattr(owner, name, layers)
        text.num_hidden_layers = number
        if types:
            text.layer_types = types


def _layers(model: nn.Module, number: int) -> tuple[nn.Module, str, nn.ModuleList] | None:
    """The one list of so many layers, with its owner and its name there; None where several lists could be meant."""
    found = [
        (owner, name, child)
        for owner in model.modules()
        for name, child in owner.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == number
    ]
    return found[0] if len(found) == 1 else None


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers of a model; none where no one list of modules holds them."""
    config: Any = getattr(model, "config", None)
    found = None if config is None else _layers(model, config.get_text_config().num_hidden_layers)
    return [] if found is None else list(found[2])


def layers_of_a_trial(layers: nn.ModuleList, text: Any) -> int:
    """How many of the first layers hold every kind of layer, at least two. text: the config of the text model.

    Layers are of one kind where their modules have the same classes, settings and shapes of weights.
    """
    if getattr(text, "num_kv_shared_layers", None):  # the last layers read an earlier layer's cache
        return len(layers)
    types = getattr(text, "layer_types", None) or [None] * len(layers)
    kinds = [(kind, _kind(layer)) for kind, layer in zip(types, layers, strict=True)]
    return min(len(layers), max(2, *(kinds.index(kind) + 1 for kind in kinds)))


def _kind(layer: nn.Module) -> list[tuple]:
    def settings(module: nn.Module) -> list[tuple[str, Any]]:
        plain = (bool, int, float, str, tuple, list, type(None))
        return [(n, v) for n, v in vars(module).items() if n not in _INDICES and isinstance(v, plain)]

    return [
        (name, type(module), settings(module), [(n, p.shape) for n, p in module.named_parameters(recurse=False)])
        for name, module in layer.named_modules()
    ]
