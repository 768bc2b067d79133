"""Every name of torch that the package uses and torch does not promise, looked up once, here alone.

Behind each stands a slower right way, so that a torch that has renamed one costs time and not a wrong number. Without
the names that let an operator pass the dispatcher by, `dispatch.call` goes through `torch.ops`; without the names that
call an operator below autograd, `torch.library.register_autograd` does. The planner and the counter of bytes alone
cannot do without theirs and raise. `MISSING` lists what this torch lacks; tests/test_upstream.py fails on any.
"""

import contextlib
from importlib import import_module
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import Parameter

MISSING: list[str] = []
"""The names that this version of torch does not have."""

for _module in ("torch._subclasses.fake_tensor", "torch.utils._python_dispatch", "torch._functorch.utils"):
    with contextlib.suppress(ImportError):
        import_module(_module)


def _find(name: str) -> Any:
    """torch.<name>; None, and an entry in MISSING, where this torch has no such name."""
    try:
        return attrgetter(name)(torch)
    except AttributeError:
        MISSING.append(f"torch.{name}")
        return None


# Who would see an operator, and whether a tensor is an ordinary one

_keys = _find("_C._dispatch_keys")
_raw_keys = _find("_C.DispatchKeySet.raw_repr")
_modes = _find("_C._len_torch_dispatch_stack")
_function_modes = _find("_C._len_torch_function_stack")
_transforms = _find("_C._are_functorch_transforms_active")
_profiler = _find("_C._autograd._profiler_enabled")
_trace = _find("_C._get_tracing_state")

BYPASS = not MISSING
"""Whether an operator may be called past torch's dispatcher: all names are here that tell when nobody minds."""

if BYPASS:
    with torch.inference_mode(False):
        _CPU_KEYS = _raw_keys(_keys(torch.empty(0, device="cpu")))


def is_watched() -> bool:
    """Whether a mode, a transform, a trace or the profiler is to see the operators that run now."""
    return (
        _modes() > 0 or _function_modes() > 0 or _transforms() or _profiler() or _trace() is not None  # torch.jit.trace
    )


def is_plain_cpu(x: Tensor) -> bool:
    """Whether x is a tensor of torch's own on the CPU, and no lazy negative, conjugate or inference tensor."""
    return type(x) in (Tensor, Parameter) and _raw_keys(_keys(x)) == _CPU_KEYS


# An operator called below autograd, from the function that makes it differentiable

_below_autograd = _find("_C._AutoDispatchBelowAutograd")
_keys_below_autograd = _find("_C._after_autograd_keyset")
_redispatch = _find("_ops.OpOverload.redispatch")

REDISPATCH = all(x is not None for x in (_below_autograd, _keys_below_autograd, _redispatch))
"""Whether an operator may be called below autograd."""


def call_below_autograd(operator: Any, keyset: Any, args: tuple) -> Any:
    """Run the operator on the back end of its device, past autograd. `keyset` is the keyset of the current call."""
    with _below_autograd():
        return _redispatch(operator, keyset & _keys_below_autograd, *args)


def in_transform() -> bool:
    """Whether one of torch.func's transforms runs."""
    return _transforms is not None and _transforms()


_forward_gradients = _find("autograd.forward_ad._set_fwd_grad_enabled")
_single_level = _find("_functorch.utils.enable_single_level_autograd_function")


def apply(function: type, *args: Any) -> Any:
    """`function.apply`, for an autograd.Function that an operator applies, under torch.func's transforms too.

    Function's own `apply` hands a transform to a second path, which wants another kind of forward. Below the dispatcher
    the transform has unwrapped its tensors already, as it has for torch's own operators.
    """
    if not in_transform():
        return function.apply(*args)  # pyright: ignore[reportAttributeAccessIssue]
    if _single_level is None or _forward_gradients is None:
        raise NotImplementedError(f"{function.__name__}: this torch has no transforms of it; the reference has them")
    above: Any = super(torch.autograd.Function, function)  # pyright: ignore[reportArgumentType]
    with _single_level():
        return above.apply(*args)


def for_outer_transforms() -> contextlib.AbstractContextManager:
    """For a Function's forward, in which gradients are off: switches them on for the transforms around the current one.

    A transform in a transform comes to an operator's autograd once more from there.
    """
    if not in_transform():
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.enable_grad())
    stack.enter_context(_forward_gradients(True))
    return stack


_find("autograd.forward_ad._current_level")


def has_tangents(inputs: list[Tensor]) -> bool:
    """Whether one of these carries a forward-mode derivative. The level, -1 outside forward mode, saves the look."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in inputs)


_find("autograd.Function._backward_cls")


def name_backward(function: type, name: str) -> None:
    """The name that `grad_fn`, profiles and anomalies show; without torch's private class they show its own."""
    if (node := getattr(function, "_backward_cls", None)) is not None:
        node.__name__ = name


# Tensors without numbers, and a mode that sees every operator

_FakeTensor = _find("_subclasses.fake_tensor.FakeTensor")


def is_fake(x: Tensor) -> bool:
    """Whether x has no numbers to read. Of a torch without FakeTensor every subclass is taken for one."""
    return type(x) not in (Tensor, Parameter) if _FakeTensor is None else isinstance(x, _FakeTensor)


def _needed(name: str, by: str) -> type:
    """The class torch.<name>, or one that says on use what lacks it."""

    class Missing:
        def __init__(self, *args: Any, **options: Any) -> None:
            raise RuntimeError(f"torch {torch.__version__} has no torch.{name}, which {by} needs")

    return _find(name) or Missing


FakeTensorMode = _needed("_subclasses.fake_tensor.FakeTensorMode", "the plan of memory")
TorchDispatchMode = _needed("utils._python_dispatch.TorchDispatchMode", "the counter of tensors' bytes")

_find("UntypedStorage._cdata")


def storage_key(storage: torch.UntypedStorage) -> int:
    """A number of the storage's own while it lives. torch keeps one Python object per storage, so id is as good."""
    return getattr(storage, "_cdata", None) or id(storage)


# Hooks of modules

_FORWARD_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_plain_module = nn.Module()
for _name in _FORWARD_HOOKS + _BACKWARD_HOOKS:
    if not hasattr(_plain_module, _name):
        MISSING.append(f"torch.nn.Module.{_name}")


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes calls of the module; True where this torch keeps its hooks elsewhere."""
    return any(getattr(module, name, True) for name in _FORWARD_HOOKS)


def has_hooks(module: nn.Module) -> bool:
    """As `has_forward_hooks`, of backward passes too."""
    return any(getattr(module, name, True) for name in _FORWARD_HOOKS + _BACKWARD_HOOKS)
