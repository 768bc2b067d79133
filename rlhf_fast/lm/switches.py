"""The numbers in a config past which a model computes something else, and trials that cross them.

A window, a chunk and a length that a model was first trained at are far longer than the rows of a trial. A trial of an
own path therefore runs the model at hand again with each of these numbers made small. The model's forward reads them
from its configs (`text_config` included) or from its modules. An own path that leaves such a number out then gives
other numbers than the model.

Left out: numbers that a model reads while it is made, such as the lengths of Llama 3's rotary embedding. Its tables are
fixed, so an own path that reads the tables has them.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_fast.lm.precision import is_half, trial

_WINDOW = re.compile(r"^(sliding_windows?(_size)?|(local_)?attention_(window|chunk)(_size)?|window_size)$")
_LENGTH = re.compile(r"^(original_max_position_embeddings|floor_scale|index_topk(_blocks)?|indexer_budget)$")
_BOUND = re.compile(r"^time_step_limit$")  # of Mamba 2's steps: the smallest and the largest
# The rows of a trial cross both. Where the prompts of a trial have 7 and 9 tokens, a prefill crosses the first number
# and decoding crosses the second.
SMALL = (5, 10)
_COARSE = 0.25  # of the size of a half-precision result: a wrong path differs by about its whole size
_LARGE_STEP = (0.5, math.inf)  # most steps of Mamba 2 are below


class Switch(NamedTuple):
    """The name of a number, and what the number is made in a trial."""

    name: str
    small: int | tuple[float, float]

    @property
    def is_window(self) -> bool:
        """Whether the number is a window or a chunk, and not a length."""
        return _WINDOW.match(self.name) is not None


def windows(config: PreTrainedConfig) -> list[str]:
    """The names of the windows and chunks in the config of the text model."""
    text = config.get_text_config()
    return [name for name, value in vars(text).items() if _WINDOW.match(name) and _is_number(value)]


def switches(model: PreTrainedModel) -> list[Switch]:
    """Every number that a trial of the model has to cross, smaller and larger."""
    names = dict.fromkeys(name for _, name, _ in _places(model))
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if types == {"full_attention"}:  # Qwen 2 names a window for layers that it may not have
        names = {name: None for name in names if not _WINDOW.match(name)}
    values = [(name, value) for _, name, value in _places(model)]
    wanted = [Switch(name, small) for name in names for small in _small(name)]
    return [switch for switch in wanted if tuple(switch) not in values]  # rows cross these as they are


@contextmanager
def shrunk(model: PreTrainedModel, switch: Switch) -> Iterator[None]:
    """Inside, the number has its small value in every config and every module of the model that has it."""
    places = [place for place in _places(model) if place[1] == switch.name]
    try:
        for owner, name, _ in places:
            owner[name] = switch.small
        yield
    finally:
        for owner, name, value in places:
            owner[name] = value


@torch.no_grad()
def difference(
    model: PreTrainedModel, plain: Callable[[], Tensor], own: Callable[[], Tensor], *, replaces: bool
) -> str | None:
    """Where `own` has other numbers than `plain`, with which `own` is compared at every switch of the model.

    plain, own: passes of the model over the same rows, whose lengths cross `SMALL`; each returns the same shape.
    replaces: whether `own` computes something in place of the model's code. Then a window that makes no difference to
        `plain` counts as a difference, because nothing can be told of it. GPT-Neo reads its window while it is made.
    None where the numbers agree; "" where they differ at once; else the switch, such as "past its sliding_window".

    A half-precision model is compared in fp32 (`precision`), and then once, coarsely, as it is.
    """
    with trial(model):
        where = _difference(model, plain, own, replaces=replaces)
    if where is None and is_half(model):
        mine, theirs = own().float(), plain().float()
        if not (mine - theirs).norm() <= _COARSE * theirs.norm():
            return ""
    return where


def _difference(
    model: PreTrainedModel, plain: Callable[[], Tensor], own: Callable[[], Tensor], *, replaces: bool
) -> str | None:
    usual = plain()
    if not agree(own(), usual):
        return ""
    for switch in switches(model):
        with shrunk(model, switch):
            truth = plain()
            effect = (truth - usual).norm()
            if effect <= 1e-5 * usual.norm():
                if switch.is_window and replaces:
                    return f"past its {switch.name}"
                continue  # read while the model was made
            mine = own()
        # A model with random weights may change by less than the tolerance.
        if not agree(mine, truth) or (mine - truth).norm() > effect / 2:
            return f"past its {switch.name}"
    return None


def agree(mine: Tensor, theirs: Tensor) -> bool:
    """Whether two results of one computation are equal up to the rounding of their dtype, beside their own size."""
    tolerance = 5e-4 if theirs.dtype == torch.float32 else 3e-2
    mine, theirs = mine.float(), theirs.float()
    size = theirs.square().mean().sqrt().item()
    if not math.isfinite(size):  # NaN or infinity in the model's own result
        return False
    return torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance * size)


def trial_rows(model: PreTrainedModel, lengths: tuple[int, ...]) -> list[Tensor]:
    """Rows of token ids of these lengths, [1, length] each, for a trial."""
    ids = torch.arange(1, sum(lengths) + 1, device=model.device) * 7 % vocabulary(model)
    return [row[None] for row in ids.split(list(lengths))]


def vocabulary(model: PreTrainedModel) -> int:
    """The number of token ids that the model can read."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])  # pyright: ignore
    except NotImplementedError:  # the decoder half of Bart
        return model.config.get_text_config().vocab_size


def switching_length(config: PreTrainedConfig) -> int | None:
    """The length in tokens past which a pass computes all its rotary tables anew (LongRoPE); None where there is none.

    The longest row of a pass then decides for all rows, so that only rows on one side may share a pass.
    """
    lengths = [
        rotary.get("original_max_position_embeddings")
        or getattr(config.get_text_config(), "original_max_position_embeddings", None)
        for rotary in rotaries(config)
        if rotary.get("rope_type", rotary.get("type")) == "longrope"
    ]
    return min((length for length in lengths if length), default=None)


def is_dynamic(config: PreTrainedConfig) -> bool:
    """Whether the rotary tables change with every length past `max_position_embeddings` (dynamic NTK)."""
    return any(rotary.get("rope_type", rotary.get("type")) == "dynamic" for rotary in rotaries(config))


def rotaries(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of the text model's rotary embeddings: one, or one for each type of layer."""
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    each = [value for value in parameters.values() if isinstance(value, dict)]
    return each or [parameters]


def _small(name: str) -> Sequence[int | tuple[float, float]]:
    """What a number of this name is made in trials."""
    if _BOUND.match(name):
        return (_LARGE_STEP,)
    return SMALL if _WINDOW.match(name) else SMALL[:1]


def _places(model: PreTrainedModel) -> list[tuple[dict[str, Any], str, Any]]:
    """(dictionary, name, value) of every switch in the configs and modules."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            configs |= {id(config): config, id(config.get_text_config()): config.get_text_config()}
    owners = [vars(config) for config in configs.values()] + [vars(module) for module in model.modules()]
    owners += [rotary for config in configs.values() for rotary in rotaries(config)]
    found, seen = [], set()
    for owner in owners:
        for name, value in owner.items():
            if (id(owner), name) not in seen and _is_switch(name, value):
                seen.add((id(owner), name))
                found.append((owner, name, value))
    return found


def _is_switch(name: str, value: object) -> bool:
    if _BOUND.match(name):
        return isinstance(value, tuple | list) and tuple(value) != (0.0, math.inf)
    return bool(_WINDOW.match(name) or _LENGTH.match(name)) and _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 1
