"""The one way into a model: every loss, score, value and log-prob pass runs inside `within`.

A wrapper such as FSDP2 makes a model's parameters whole while a forward method of the model's root runs, and at no
other time. A pass that reached for the backbone or for the head's weight from outside would find shards. `within` runs
a pass as a forward method of the root where `enter_by` has opened the model. For every other model `within` calls the
pass plainly. Inside `within` every weight is a plain tensor. A pass may read a weight and must not keep it.

    enter_by(model, torch.distributed.fsdp.register_fsdp_forward_method)
    loss = within(model, objective, batch)
"""

from collections.abc import Callable
from contextvars import ContextVar
from functools import partial, wraps
from types import MethodType
from typing import Any, TypeVar

from torch import nn

Result = TypeVar("Result")

_ENTRY = "rlhf_fast_pass"
_EXTRA = "rlhf_fast_extra_runs"
_entered: ContextVar[tuple[nn.Module, ...]] = ContextVar("_entered", default=())


def within(model: nn.Module, passes: Callable[..., Result], *args: Any, **options: Any) -> Result:
    """`passes(*args, **options)` as a forward of the root `model`; a plain call inside another pass of `model`."""
    entry = getattr(model, _ENTRY, None)
    if entry is None or any(entered is model for entered in _entered.get()):
        return passes(*args, **options)
    before = _entered.set((*_entered.get(), model))
    try:
        # The arguments are hidden in one function, because a wrapper would cast tensors to its parameters' dtype.
        return entry(partial(passes, *args, **options))
    finally:
        _entered.reset(before)


def one_pass(function: Callable[..., Result]) -> Callable[..., Result]:
    """A decorator: `function(model, ...)` runs `within` its model. A method runs `within` the `model` of its object."""

    @wraps(function)
    def run(owner: Any, *args: Any, **options: Any) -> Result:
        model = owner if isinstance(owner, nn.Module) else owner.model
        return within(model, function, owner, *args, **options)

    return run


def enter_by(model: nn.Module, register: Callable[[nn.Module, str], None]) -> None:
    """Gives the root `model` the forward method that `within` calls.

    register: called as `register(model, name)`; tells the wrapper the name of the new forward method.
    """
    setattr(model, _ENTRY, MethodType(_run, model))
    register(model, _ENTRY)


def run_alike(module: nn.Module, extra: Callable[[int], int]) -> None:
    """Tells the passes through `module`, which may run its layers several times, of a wrapper that counts these runs.

    extra: from the number of a pass's runs to the number of empty runs that the pass has to make more.
    """
    setattr(module, _EXTRA, extra)


def extra_runs(module: nn.Module, runs: int) -> int:
    """How many empty runs a pass through `module` makes behind `runs` runs of its layers. Called before the first."""
    extra = getattr(module, _EXTRA, None)
    return 0 if extra is None else extra(runs)


def is_open(model: nn.Module) -> bool:
    """Whether `enter_by` has opened the root `model`."""
    return hasattr(model, _ENTRY)


def call(model: nn.Module, **inputs: Any) -> Any:
    """`model(**inputs)` inside `within`. A wrapped root's hooks have run before and must not run twice."""
    return model(**inputs) if getattr(model, _ENTRY, None) is None else model.forward(**inputs)


def _run(_: nn.Module, passes: Callable[[], Result]) -> Result:
    return passes()
