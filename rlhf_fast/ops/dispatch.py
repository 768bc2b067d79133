"""Which back end runs an operation, and the library that holds the operators.

`KERNELS` holds what each back end implements, and `OWN` says which back end a device type has; an operation that it
lacks runs `ops.reference`. The environment variable RLHF_FAST_BACKEND and the context manager `backend` name another
back end (tests, bench, bug reports); what that lacks runs the reference too. Under TRITON_INTERPRET=1 the Triton
kernels take CPU tensors.

A compiled core that is missing is replaced by the reference, with one warning. One that is there but does not load
is an error: a broken build must not pass for a slow one.
"""

import contextlib
import functools
import importlib.util
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from typing_extensions import TypeVarTuple, Unpack

from rlhf_fast.ops import private
from rlhf_fast.ops.fastest import FASTEST

LIBRARY = torch.library.Library("rlhf_fast", "DEF")

BACKENDS = ("reference", "cpu", "triton", "cuda")

COMPILED = importlib.util.find_spec("rlhf_fast._cpu") is not None
if COMPILED:
    from rlhf_fast import _cpu
else:
    _cpu = cast(Any, None)  # no caller has it, because `kernel` then registers nothing for the CPU
    warnings.warn(
        "rlhf_fast._cpu is not built: CPU tensors run the slower plain PyTorch reference. "
        "Reinstall with a C++ compiler present (`pip install -e .`).",
        stacklevel=2,
    )

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GPU_BUILD = torch.version.cuda is not None or torch.version.hip is not None
TRITON = importlib.util.find_spec("triton") is not None and (GPU_BUILD or INTERPRETED)
CUDA = importlib.util.find_spec("rlhf_fast._cuda") is not None and torch.version.cuda is not None

OWN = {"cpu": "cpu"} | ({"cuda": "triton" if TRITON else "cuda"} if TRITON or CUDA else {})
"""By device type, the back end that runs where neither an override nor `fastest.FASTEST` names another."""
KERNELS: dict[str, dict[str, Callable]] = {name: {} for name in ("cpu", "triton", "cuda")}
"""By back end and operator, its implementation; filled by `kernel`. What is not in it runs `ops.reference`."""
ARGUMENTS: dict[str, tuple[str, ...]] = {}
RESULTS: dict[str, tuple[str, ...]] = {}
"""By operator, the names in its schema; filled by `define`."""


def define(schema: str) -> None:
    """Declare an operator, in torch's language of schemas: "name(Tensor x, float y) -> (Tensor a, Tensor b)"."""
    LIBRARY.define(schema)
    match = re.fullmatch(r"(\w+)\((.*)\) -> (.*)", schema)
    assert match is not None, schema  # torch has parsed the schema
    operator, arguments, results = match.groups()
    ARGUMENTS[operator] = tuple(argument.split()[-1] for argument in arguments.split(", "))
    RESULTS[operator] = tuple(result.split()[-1] for result in results.strip("()").split(", ") if result)


def kernel(operator: str, *names: str) -> Callable[[Callable], Callable]:
    """Decorator: this function runs the operator on the back ends named. It has the operator's own signature."""

    def register(function: Callable) -> Callable:
        if operator not in _chosen_at_call:
            _chosen_at_call.add(operator)
            for key in ("CPU", "CUDA"):
                LIBRARY.impl(operator, functools.partial(run_kernel, operator), key)
        for name in names:
            if name != "cpu" or COMPILED:
                KERNELS[name][operator] = function
        return function

    return register


_chosen_at_call: set[str] = set()


def run_kernel(operator: str, first: Tensor, *args: object) -> object:
    """What torch's dispatcher calls: the operator on the back end chosen for the device of its first argument."""
    device = first.device.type
    return KERNELS[_chosen(operator, device, first.numel()) or OWN[device]][operator](first, *args)


AUTOGRAD: dict[str, Callable] = {}
"""By operator, what makes it differentiable past the dispatcher; filled by `gradients.register_autograd`."""


def call(operator: str, *args: object) -> Any:
    """`torch.ops.rlhf_fast.<operator>(*args)`, past torch's dispatcher where nothing in it would see the operator.

    Going through torch's dispatcher and back costs a Python operator 0.06 ms, a third of a small loss and its gradient.
    """
    if not private.BYPASS or torch.compiler.is_compiling() or not _is_plain(args):
        return getattr(torch.ops.rlhf_fast, operator)(*args)
    differentiable = AUTOGRAD.get(operator)
    return differentiable(None, *args) if differentiable else KERNELS["cpu"][operator](*args)


def _is_plain(args: tuple) -> bool:
    """Ordinary CPU tensors, their own back end, and no mode, transform, trace or profiler that is to see the op."""
    if _override.get() not in (None, "cpu") or _is_watched():
        return False
    for x in args:  # noqa: SIM110  a generator costs as much as the tests
        if isinstance(x, Tensor) and not _is_plain_cpu(x):
            return False
    return True


_is_watched, _is_plain_cpu = private.is_watched, private.is_plain_cpu  # a call of an operator looks both up


def _chosen(operator: str, device: str, elements: int = 0) -> str | None:
    """The back end of `KERNELS` that runs the operator on a device; None: the reference.

    elements: of the operator's first tensor.
    """
    name, other = OWN.get(device), override()
    if other is None and device == "cuda":
        name = _fastest(operator, elements) or name
    if other is not None:
        runs = other == device or (other == "triton" and (device == "cuda" or INTERPRETED))
        name = other if runs else None
    return name if name is not None and operator in KERNELS[name] else None


def _fastest(operator: str, elements: int) -> str | None:
    """The GPU back end that was measured to be the fastest at this size; None where none was, or it is not built."""
    reached = [name for least, name in FASTEST.get(operator, ()) if elements >= least]
    return reached[-1] if reached and operator in KERNELS[reached[-1]] else None


def _known(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_DEFAULT = _known(os.environ.get("RLHF_FAST_BACKEND") or None, "RLHF_FAST_BACKEND")
_override: ContextVar[str | None] = ContextVar("rlhf_fast_backend", default=_DEFAULT)
_lock = threading.Lock()
_entered: list[list[str]] = []  # the blocks of `backend` in all threads, the latest last
# The override of the latest of them. torch.compile reads it, because it knows no ContextVar, and compiles anew when it
# changes. What a compiled graph runs goes by `_override` all the same.
_traced = _DEFAULT


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every operation inside the block on the named back end ("reference", "cpu", "triton" or "cuda").

    The override belongs to the thread, or the asyncio task, that enters the block. A backward pass runs on the back end
    of its forward pass, in whichever thread. torch.compile takes the override of the block that was entered last in any
    thread. Raises ValueError for an unknown name.
    """
    global _traced
    known, block = _known(name, "backend"), [name]
    with overridden(known):
        with _lock:
            _entered.append(block)
            _traced = known
        try:
            yield
        finally:
            with _lock:
                _entered[:] = [other for other in _entered if other is not block]
                _traced = _entered[-1][0] if _entered else _DEFAULT


def override() -> str | None:
    """The back end that `backend` or the environment names in this thread."""
    return _traced if torch.compiler.is_compiling() else _override.get()


@contextlib.contextmanager
def overridden(name: str | None) -> Iterator[None]:
    """Inside, this thread's override is `name`, as `override` has it in another thread."""
    token = _override.set(name)
    try:
        yield
    finally:
        _override.reset(token)


def has_kernel(op: str, tensor: Tensor) -> bool:
    """Whether a kernel, not the reference, runs this operation on this tensor."""
    if override() is None:  # what `_chosen` says then, without the cost of asking
        name = OWN.get(tensor.device.type)
        return name is not None and op in KERNELS[name]
    return _chosen(op, tensor.device.type) is not None


# What every launch of a compiled kernel needs

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


def code(x: Tensor) -> int:
    """The compiled core's number for a dtype."""
    return _CODES[x.dtype]


def has_address(x: Tensor) -> bool:
    """Whether compiled code may read x at `x.data_ptr()`.

    Only of torch's own two classes: a FakeTensor, a DTensor or any other subclass may hold its numbers elsewhere, or
    nowhere, and its address is then one that no memory stands at.
    """
    return type(x) in (Tensor, Parameter)


def pointer(x: Tensor | None) -> int:
    """The address the compiled core reads or writes; 0 for an absent tensor."""
    return 0 if x is None else x.data_ptr()


def threads(x: Tensor) -> int:
    """Threads for a kernel that passes over x: one per 32,768 elements, as in torch's own CPU kernels."""
    return max(1, min(torch.get_num_threads(), x.numel() // 32_768))


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of log-probs, sums and losses of x: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


Tensors = TypeVarTuple("Tensors")
"""What a caller passes, each a Tensor or a Tensor | None: the results have the same types in the same order."""


def common_dtype(*tensors: Unpack[Tensors]) -> tuple[Unpack[Tensors]]:
    """float64 if one of them is, else float32: the small kernels take one dtype."""
    if all(x is None or x.dtype is torch.float32 for x in tensors):  # pyright: ignore[reportAttributeAccessIssue]
        return tensors
    wide = any(x is not None and x.dtype == torch.float64 for x in tensors)  # pyright: ignore[reportAttributeAccessIssue]
    dtype = torch.float64 if wide else torch.float32
    return tuple(x if x is None else x.to(dtype) for x in tensors)  # pyright: ignore


def on_device(launch: Callable) -> Callable:
    """Decorator of a launch on a GPU: makes its first tensor's device the current one."""

    @functools.wraps(launch)
    def call(first: Tensor, *args: object) -> object:
        with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
            return launch(first, *args)

    return call


def contiguous(*tensors: Unpack[Tensors]) -> tuple[Unpack[Tensors]]:
    """Each tensor as it is, or copied if its numbers do not lie side by side; None stays None."""
    return tuple(x if x is None else x.contiguous() for x in tensors)  # pyright: ignore
