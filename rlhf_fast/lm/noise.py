"""Dropout is off: every pass of a model in train mode gives the numbers of eval mode.

Dropout, dropped layers, router jitter and sampled routing would make the log-probs of decoding and of training differ.
`silence` sets to 0 what the model's modules and configs name so: `p` of a dropout module, `attention_dropout` or
`router_jitter_noise`. It then compares two passes in train mode with a pass in eval mode. Where noise is left, the
modules between the layers that checkpoint their activations stay in eval mode. Where noise is left even then, the model
is refused.

eval() alone would turn the noise off too, but transformers checkpoints activations in train mode only.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_fast.lm.switches import trial_rows

_NOISE = re.compile(r"drop|jitter|noise")
Place = tuple[dict[str, Any], str, Any]
# The attribute of a model that keeps what its configs said: a copy of the model copies it too.
_RATES = "rlhf_fast_rates"


def silence(model: PreTrainedModel, *, trained: bool = True) -> None:
    """Turns dropout and every other noise of train mode off, for good.

    trained: whether the model is going to run in train mode; else its jitter stays, which eval mode does not apply.
    Raises ValueError where passes in train mode still differ from each other or from eval mode.
    """
    if not trained:
        _set_to_zero(model, [place for place in _places(model) if not _is_jitter(place)])
        return
    with torch.random.fork_rng(devices=[]):  # the passes must not shift what the caller draws
        usual, places = _trial(model, training=False), _places(model)
        _set_to_zero(model, places)
        if not _near(_trial(model, training=False), usual):  # PhiMoE's routing reads its jitter in eval mode too
            for owner, name, value in filter(_is_jitter, places):
                owner[name] = value
        if usual is None or _is_quiet(model, usual):
            return
        for module in _outermost_without_checkpointing(model):
            module.train = MethodType(_stay_in_eval, module)
        if not _is_quiet(model, usual):
            raise ValueError(
                f"model: expected passes without noise in train mode, got two that differ in {type(model).__name__}"
            )


@contextmanager
def as_before(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the configs have their dropout and jitter again, so that they are saved as they came."""
    configs, rates = _configs(model), getattr(model, _RATES, {})
    places = [(vars(configs[part]), name, value) for (part, name), value in rates.items()]
    quiet = [owner[name] for owner, name, _ in places]
    for owner, name, value in places:
        owner[name] = value
    try:
        yield
    finally:
        for (owner, name, _), value in zip(places, quiet, strict=True):
            owner[name] = value


def _places(model: PreTrainedModel) -> list[Place]:
    """(dictionary, name, value) of every rate above 0 in the configs and modules."""
    owners = [vars(module) for module in model.modules()] + [vars(config) for config in _configs(model).values()]
    found = [
        (owner, name, value)
        for owner in owners
        for name, value in owner.items()
        if _NOISE.search(name) and isinstance(value, float) and value > 0
    ]
    dropouts = [vars(module) for module in model.modules() if "drop" in type(module).__name__.lower()]
    return found + [(owner, "p", owner["p"]) for owner in dropouts if isinstance(owner.get("p"), float) and owner["p"]]


def _configs(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """The model's config by the name "", and the configs inside it by their own names."""
    return {"": model.config} | {n: c for n, c in vars(model.config).items() if isinstance(c, PreTrainedConfig)}


def _is_jitter(place: Place) -> bool:
    return place[1] != "p" and "drop" not in place[1]


def _set_to_zero(model: PreTrainedModel, places: list[Place]) -> None:
    parts = {id(vars(config)): part for part, config in _configs(model).items()}
    rates = {(parts[id(owner)], name): value for owner, name, value in places if id(owner) in parts}
    setattr(model, _RATES, getattr(model, _RATES, {}) | rates)
    for owner, name, _ in places:
        owner[name] = 0.0


def _is_quiet(model: PreTrainedModel, usual: Tensor) -> bool:
    first, second = (_trial(model, training=True) for _ in range(2))
    return first is not None and second is not None and torch.equal(first, second) and _near(first, usual)


def _near(mine: Tensor | None, theirs: Tensor | None) -> bool:
    """Whether two passes differ in no more than the order of their sums."""
    if mine is None or theirs is None:
        return mine is theirs
    tolerance = 1e-4 if theirs.dtype == torch.float32 else 1e-2
    return (mine - theirs).float().norm().item() <= tolerance * theirs.float().norm().item()


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `module.train`."""
    return nn.Module.train(module, False)


@torch.no_grad()
def _trial(model: PreTrainedModel, *, training: bool) -> Tensor | None:
    """The last hidden states of a row of eight tokens; None of a model that cannot run here."""
    (ids,), was, backbone = trial_rows(model, (8,)), model.training, model.base_model
    model.train(training)
    try:
        return backbone(input_ids=ids, use_cache=False)[0]
    except Exception:  # whatever else the model wants; the first step says it
        return None
    finally:
        model.train(was)


def _outermost_without_checkpointing(module: nn.Module) -> list[nn.Module]:
    """The largest parts in which no module checkpoints its activations."""
    found = []
    for child in module.children():
        if any(hasattr(part, "gradient_checkpointing") for part in child.modules()):
            found += _outermost_without_checkpointing(child)
        else:
            found.append(child)
    return found
