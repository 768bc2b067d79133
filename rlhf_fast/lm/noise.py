"""Dropout is off: every pass of a model in train mode gives the numbers of eval mode.

Dropout, dropped layers, router jitter and sampled routing would make the log-probs of decoding and of training differ.
`silence` sets to 0 every dropout that the model's modules and configs name: `p` of a dropout module,
`attention_dropout`, `layerdrop`. It then compares two passes in train mode with a pass in eval mode. Where noise is
left, where a jitter is named, or where a pass still draws random numbers, the modules inside the layers that checkpoint
their activations stay in eval mode. The jitter keeps its value, because PhiMoE's routing reads it in eval mode too.
Where noise is left even then, the model is refused.

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

_JITTER = re.compile(r"jitter|noise")
# The attribute of a model that keeps what its configs said: a copy of the model copies it too.
_RATES = "rlhf_fast_rates"


def silence(model: PreTrainedModel, *, trained: bool = True) -> None:
    """Turns dropout and every other noise of train mode off, for good.

    trained: whether the model is going to run in train mode; else nothing is compared.
    Raises ValueError where passes in train mode still differ from each other or from eval mode.
    """
    with torch.random.fork_rng(devices=[]):  # the passes must not shift what the caller draws
        usual = _trial(model, training=False) if trained else None
        _drop_nothing(model)
        if usual is None or not (_jitters(model) or _draws(model)) and _is_quiet(model, usual):
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
    rates = getattr(model, _RATES, {})
    configs = _configs(model) if rates else {}
    places = [(vars(configs[part]), name, value) for (part, name), value in rates.items()]
    quiet = [owner[name] for owner, name, _ in places]
    for owner, name, value in places:
        owner[name] = value
    try:
        yield
    finally:
        for (owner, name, _), value in zip(places, quiet, strict=True):
            owner[name] = value


def _owners(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The attributes of each module and of each config."""
    return [vars(module) for module in model.modules()] + [vars(config) for config in _configs(model).values()]


def _jitters(model: PreTrainedModel) -> bool:
    return any(_JITTER.search(name) and _is_rate(value) for owner in _owners(model) for name, value in owner.items())


def _is_rate(value: object) -> bool:
    """Some configs (MPT) have whole numbers as rates."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _drop_nothing(model: PreTrainedModel) -> None:
    found = [
        (owner, name, value)
        for owner in _owners(model)
        for name, value in owner.items()
        if "drop" in name and _is_rate(value)
    ]
    parts = {id(vars(config)): part for part, config in _configs(model).items()}
    rates = {(parts[id(owner)], name): value for owner, name, value in found if id(owner) in parts}
    setattr(model, _RATES, getattr(model, _RATES, {}) | rates)
    for owner, name, _ in found:
        owner[name] = type(owner[name])(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout) or "drop" in type(module).__name__.lower() and hasattr(module, "p"):
            vars(module)["p"] = 0.0


def _configs(model: PreTrainedModel) -> dict[str, PreTrainedConfig]:
    """The model's config by the name "", and the configs inside it, at any depth, by dotted names."""
    found, left = {}, [("", model.config)]
    while left:
        place, config = left.pop()
        found[place] = config
        inside = [(name, part) for name, part in vars(config).items() if isinstance(part, PreTrainedConfig)]
        left += [(f"{place}.{name}", part) for name, part in inside if all(part is not seen for seen in found.values())]
    return found


def _draws(model: PreTrainedModel) -> bool:
    """Whether a pass in train mode draws random numbers. A sampled routing may choose the same experts twice."""
    before = _random_state(model)
    _trial(model, training=True)
    return not torch.equal(_random_state(model), before)


def _random_state(model: PreTrainedModel) -> Tensor:
    return torch.cuda.get_rng_state(model.device) if model.device.type == "cuda" else torch.get_rng_state()


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
