"""The parts of a model that text does not pass through, such as a vision tower: kept, and out of the way.

A parked part is no longer among the modules of its model. Nothing trains it, moves it to another device or counts its
bytes, and no adapter is put on it. `whole` puts the parts back for as long as the model is saved. They stay in CPU
memory until then; a frozen model, which nobody saves, lets go of them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_fast.lm.passes import forward_inputs
from rlhf_fast.lm.precision import trial
from rlhf_fast.lm.sequences import position_ids
from rlhf_fast.lm.switches import agree, trial_rows

_BESIDE_TEXT = re.compile(r"vis|image|img|video|audio|speech|sound|modal|project|connector|merger|align|mm_|vq|extend")


class Parked(nn.Module):
    """Stands where a part of a model stood. `part` is the part, or None where the model let go of it."""

    def __init__(self, name: str, part: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.keep(part)

    @property
    def part(self) -> nn.Module | None:
        return vars(self)["held"][0]

    def keep(self, part: nn.Module | None) -> None:
        """In a tuple, where PyTorch does not find it."""
        vars(self)["held"] = (part,)

    def forward(self, *_: Any, **__: Any) -> Any:
        raise _Touched(self.name)

    def __getattr__(self, name: str) -> Any:
        if _watching:
            raise _Touched(vars(self)["name"])
        return super().__getattr__(name)

    def __deepcopy__(self, _: Any) -> "Parked":
        return self  # a copy of a model shares what nothing changes


class _Touched(Exception):
    """A pass has used a parked part."""


_watching: list[bool] = []


def park(model: PreTrainedModel, *, keep: bool) -> None:
    """Takes off the parts of `model` that text does not pass through.

    A part for other inputs that text passes through all the same, as in Gemma 3n, stays.

    keep: whether the parts are kept in CPU memory, so that `model` can be saved.
    Raises ValueError for a model that cannot read text alone.
    """
    places = _candidates(model)
    if not places:
        return
    parked = {(id(owner), name): Parked(name, owner.get_submodule(name)) for owner, name in places}
    for owner, name in places:
        setattr(owner, name, parked[id(owner), name])
    while (touched := _touched(model)) is not None:
        for owner, name in places:
            if name == touched and isinstance(getattr(owner, name), Parked):
                part = parked[id(owner), name].part
                assert part is not None
                setattr(owner, name, part)
    _check_positions(model)
    if not keep:
        for _, _, stand_in in _parked(model):
            stand_in.keep(None)


def freeze(model: PreTrainedModel) -> None:
    """Freezes the parts for other inputs that stayed, because training on text must not move them."""
    for owner, name in _candidates(model):
        owner.get_submodule(name).requires_grad_(False)


@contextmanager
def whole(model: PreTrainedModel) -> Iterator[None]:
    """Inside, every parked part is in its place again. Raises ValueError where the model let go of a part."""
    places = list(_parked(model))
    for _, name, stand_in in places:
        if stand_in.part is None:
            raise ValueError(
                f"model: expected all parts of {model.name_or_path} to save them, got it without its {name}"
            )
    for owner, name, stand_in in places:
        setattr(owner, name, stand_in.part)
    try:
        yield
    finally:
        for owner, name, stand_in in places:
            setattr(owner, name, stand_in)


def parts(model: nn.Module) -> list[nn.Module]:
    """The parked parts that the model keeps."""
    return [stand_in.part for _, _, stand_in in _parked(model) if stand_in.part is not None]


def _parked(model: nn.Module) -> list[tuple[nn.Module, str, Parked]]:
    return [
        (owner, name, child)
        for owner in list(model.modules())
        for name, child in owner.named_children()
        if isinstance(child, Parked)
    ]


def _candidates(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Children of the model and of its trunk whose names tell of inputs other than text, or that stand beside a decoder
    of text in the trunk."""
    if not model.config.sub_configs:
        return []
    found, embeddings = [], model.get_input_embeddings()
    for owner in {id(part): part for part in (model, model.base_model)}.values():
        children = dict(owner.named_children())
        texts = [name for name, child in children.items() if any(part is embeddings for part in child.modules())]
        nested = owner is model.base_model and any(isinstance(children[name], PreTrainedModel) for name in texts)
        found += [
            (owner, name)
            for name, child in children.items()
            if name not in texts
            and child is not model.get_output_embeddings()
            and (nested or _BESIDE_TEXT.search(name))
        ]
    return found


@torch.no_grad()
def _check_positions(model: PreTrainedModel) -> None:
    """ValueError unless the positions of a text count from 0."""
    if model.device.type == "meta":
        return
    base: Any = model.base_model
    (ids,) = trial_rows(model, (8,))
    mask, training = torch.ones_like(ids, dtype=torch.bool), model.training
    model.eval()
    with trial(model):
        plain = base(input_ids=ids, use_cache=False)[0]
        ours = base(**forward_inputs(base, ids, mask, position_ids(mask)), use_cache=False)[0]
    model.train(training)
    if not agree(ours, plain):
        got = type(model).__name__
        raise ValueError(f"model: expected a model that counts the positions of a text from 0, got {got}")


@torch.no_grad()
def _touched(model: PreTrainedModel) -> str | None:
    """The name of the first parked part that a pass over text uses; None where it uses none."""
    training = model.training
    model.eval()
    _watching.append(True)
    try:
        (ids,) = trial_rows(model, (8,))
        model.base_model(input_ids=ids, use_cache=False)
    except _Touched as touched:
        return str(touched)
    except Exception as error:
        if model.device.type != "meta":  # where numbers cannot be read, the trial ends inside the decoder
            said = " ".join(str(error).split())
            raise ValueError(
                f"model: expected a model that reads text alone, got {type(model).__name__}: {said:.160}"
            ) from error
    finally:
        _watching.pop()
        model.train(training)
    return None
